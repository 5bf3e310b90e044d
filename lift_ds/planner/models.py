"""ModelFacts: the matrices and sizes of a model, from its configuration, by attaching LIFT to it without weights."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from lift_ds.config import LiftConfig
from lift_ds.model.attach import dry_attach
from lift_ds.model.weights import principal_weights
from lift_ds.planner.architecture import Architecture, read_architecture
from lift_ds.planner.configuration import in_one_line, left_out, read_content, settings_of
from lift_ds.runtime.logs import get_logger

#: The classes of language models, each with the configurations it is for: those with a decoder alone, those with an
#: encoder too, those that see images.
_CAUSAL = (transformers.AutoModelForCausalLM, transformers.MODEL_FOR_CAUSAL_LM_MAPPING)
_WITH_ENCODER = (transformers.AutoModelForSeq2SeqLM, transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING)
_WITH_IMAGES = (transformers.AutoModelForImageTextToText, transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)


@dataclass(frozen=True)
class ModelFacts(Architecture):
    """What the formulas need to know of a model: the sizes of its architecture, and its matrices.

    Args:
        name: as the user called it.
        shapes: name -> (m, n) of each managed weight, in the order of the model; of a stack that of one matrix.
        matrices: name -> how many matrices it holds.
        entries: name -> k, of all its matrices.
        dense: shape of each parameter that is trained densely beside: a new head, what `extra_trainable` names.
        others: elements of each frozen parameter that is no managed matrix.
        left_out: sizes that its configuration leaves to transformers, see `configuration`.
    """

    name: str
    shapes: dict[str, tuple[int, int]]
    matrices: dict[str, int]
    entries: dict[str, int]
    dense: tuple[tuple[int, ...], ...]
    others: tuple[int, ...]
    left_out: tuple[str, ...] = ()

    @property
    def managed(self) -> int:
        """M."""
        return sum(map(math.prod, self.tall_shapes.values()))

    @property
    def tall_shapes(self) -> dict[str, tuple[int, int]]:
        """Name -> [m, n] of each managed weight; the matrices of a stack are one below the other, as in memory."""
        return {name: (self.matrices[name] * rows, columns) for name, (rows, columns) in self.shapes.items()}

    @property
    def parameters(self) -> int:
        """All parameters of the model."""
        return self.managed + self.dense_parameters + sum(self.others)

    @property
    def dense_parameters(self) -> int:
        """Those trained densely beside."""
        return sum(map(math.prod, self.dense))


def read_facts(model: str, config: LiftConfig) -> ModelFacts:
    """Find the facts of a model; nothing is downloaded, no weight allocated.

    Args:
        model: a named size, or a folder with a config.json, or such a file.
        config: LIFT's settings, which say what is managed and how many entries are trained.

    Raises:
        ValueError: for an unknown model, a configuration without a needed field, or one LIFT cannot manage.
    """
    content, source = read_content(model)
    settings = settings_of(content, source)
    facts = facts_of(model, settings, build_on_meta(settings, config))
    return dataclasses.replace(facts, left_out=left_out(settings, content))


def build_on_meta(settings: Any, config: LiftConfig) -> nn.Module:
    """Build a language model in bf16 on the meta device and attach LIFT to it.

    Args:
        settings: its transformers configuration.
        config: LIFT's settings.

    Raises:
        ValueError: when transformers has no language model for it or cannot build it, or LIFT cannot manage it.
    """
    build = _builder_of(settings)
    try:
        with torch.device("meta"):
            model = build(settings, dtype=torch.bfloat16)
    except Exception as error:  # whatever a model's code does not expect of its configuration
        kind = type(settings).__name__
        raise ValueError(f"transformers cannot build a model from this {kind}: {in_one_line(error)}") from error
    with _quiet():
        return dry_attach(model, config)


def _builder_of(settings: Any) -> Any:
    """Return what builds the model of a configuration.

    That is the class that the configuration names in `architectures`, where transformers has it. Otherwise it is a
    language model: with an encoder where the configuration has one, one that sees images where it has a section for
    them, else one with a decoder alone.
    """
    for name in settings.architectures or ():
        named: Any = getattr(transformers, name, None)
        if _fits(named, settings):
            return named._from_config
    kinds = [_CAUSAL, _WITH_ENCODER, _WITH_IMAGES]
    if settings.is_encoder_decoder:
        kinds = [_WITH_ENCODER, _WITH_IMAGES, _CAUSAL]
    elif "vision_config" in settings.sub_configs:
        kinds = [_WITH_IMAGES, _CAUSAL, _WITH_ENCODER]
    for automatic, known in kinds:
        if type(settings) in known:
            return automatic.from_config
    raise ValueError(
        f"transformers {transformers.__version__} has no language model of model_type={settings.model_type!r}"
    )


def _fits(found: Any, settings: Any) -> bool:
    """Tell whether a class is a model for a configuration, and more than one that ends in its last hidden states."""
    if not isinstance(found, type) or getattr(found, "config_class", None) is not type(settings):
        return False
    return found is not transformers.MODEL_MAPPING.get(type(settings), None)


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
    weights = dict(principal_weights(model))
    known = {id(p) for weight in weights.values() for p in (weight.weight, *weight.principal.parameters())}
    beside = [parameter for parameter in model.parameters() if id(parameter) not in known]
    return ModelFacts(
        name=name,
        shapes={name: (weight.layout.of_one.rows, weight.layout.columns) for name, weight in weights.items()},
        matrices={name: weight.matrices for name, weight in weights.items()},
        entries={name: weight.entries() for name, weight in weights.items()},
        dense=tuple(tuple(parameter.shape) for parameter in beside if parameter.requires_grad),
        others=tuple(parameter.numel() for parameter in beside if not parameter.requires_grad),
        **vars(read_architecture(settings, model)),
    )
