"""ModelFacts: the matrices and sizes of a model, from its configuration, by attaching LIFT to it without weights."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from lift_ds.attach import dry_attach
from lift_ds.config import LiftConfig, read_json_object
from lift_ds.layers import PrincipalLayer, principal_layers
from lift_ds.logs import get_logger
from lift_ds.planner.presets import PRESETS, preset_named

#: Fields of a config.json without which transformers would fill in those of some other model.
NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")


@dataclass(frozen=True)
class ModelFacts:
    """What the formulas need to know of a model.

    Args:
        name: as the user called it.
        shapes: dotted name -> (m, n) of each managed matrix, in the order of the model.
        entries: dotted name -> k.
        others: elements of each parameter that LIFT does not manage.
        hidden: h.
        intermediate: i, of the feed-forward layers.
        key_value: c, width of keys.
        heads: of the queries.
        layers: L.
        vocabulary: V.
    """

    name: str
    shapes: dict[str, tuple[int, int]]
    entries: dict[str, int]
    others: tuple[int, ...]
    hidden: int
    intermediate: int
    key_value: int
    heads: int
    layers: int
    vocabulary: int

    @property
    def managed(self) -> int:
        """M."""
        return sum(rows * columns for rows, columns in self.shapes.values())

    @property
    def parameters(self) -> int:
        """All parameters of the model."""
        return self.managed + sum(self.others)


def read_facts(model: str, config: LiftConfig) -> ModelFacts:
    """Find the facts of a model; nothing is downloaded, no weight allocated.

    Args:
        model: a preset, or a folder with a config.json, or such a file.
        config: LIFT's settings, which say what is managed and how many entries are trained.

    Raises:
        ValueError: for an unknown model, a configuration without a needed field, or one LIFT cannot manage.
    """
    settings = load_config(model)
    return facts_of(model, settings, build_on_meta(settings, config))


def load_config(model: str) -> Any:
    """Return the transformers configuration of a preset or folder.

    Raises:
        ValueError: as `read_facts`.
    """
    preset = preset_named(model)
    if preset is not None:
        content, source = dict(preset.config), model
    else:
        path = Path(model)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(
                f"--model {model!r} is neither a size ({', '.join(PRESETS)}) nor a folder with a config.json"
            )
        content, source = read_json_object(str(path)), str(path)
    kind = content.pop("model_type", None)
    if kind not in transformers.CONFIG_MAPPING:
        raise ValueError(f"{source}: model_type={kind!r} is no model of transformers {transformers.__version__}")
    aliases = transformers.CONFIG_MAPPING[kind].attribute_map
    missing = [name for name in NEEDED if name not in content and aliases.get(name) not in content]
    if missing:
        raise ValueError(f"{source}: has no {', '.join(missing)}; a plan needs {', '.join(NEEDED)}")
    wrong = [name for name in NEEDED if not _is_count(content.get(name, content.get(aliases.get(name, ""))))]
    if wrong:
        raise ValueError(f"{source}: {wrong[0]} is no whole number of at least 1")
    return transformers.AutoConfig.for_model(kind, **content)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def build_on_meta(settings: Any, config: LiftConfig) -> nn.Module:
    """Build a causal language model in bf16 on the meta device and attach LIFT to it.

    Args:
        settings: its transformers configuration.
        config: LIFT's settings.

    Raises:
        ValueError: when there is no such causal language model, or LIFT cannot manage it.
    """
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    with _quiet():
        return dry_attach(model, config)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = get_logger()
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def facts_of(name: str, settings: Any, model: nn.Module) -> ModelFacts:
    """Read off a model that LIFT is attached to.

    Args:
        name: what to call it.
        settings: its transformers configuration.
        model: on any device.
    """
    settings = settings.get_text_config()
    layers = dict(principal_layers(model))
    known = {id(p) for layer in layers.values() for p in (layer.weight, *layer.principal.parameters())}
    heads = settings.num_attention_heads
    head = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    return ModelFacts(
        name=name,
        shapes={name: _shape(layer) for name, layer in layers.items()},
        entries={name: layer.entries() for name, layer in layers.items()},
        others=tuple(p.numel() for p in model.parameters() if id(p) not in known),
        hidden=settings.hidden_size,
        intermediate=settings.intermediate_size,
        key_value=head * (getattr(settings, "num_key_value_heads", None) or heads),
        heads=heads,
        layers=settings.num_hidden_layers,
        vocabulary=settings.vocab_size,
    )


def _shape(layer: PrincipalLayer) -> tuple[int, int]:
    rows, columns = layer.shape()
    return rows, columns
