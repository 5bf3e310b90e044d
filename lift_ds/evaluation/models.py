"""Loading of the model that is evaluated, whatever its path holds."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lift_ds import checkpoint
from lift_ds.delta import DeltaFile, TunedModel, is_delta

_ADAPTER = "adapter_config.json"
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "model.safetensors.index.json")


@dataclass(frozen=True)
class Loaded:
    """A model and its tokenizer."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load(name: str, dtype: str, device: str | None, flag: str = "MODEL", base: str | None = None) -> Loaded:
    """Load a model for evaluation.

    Args:
        name: a name on the Hub; a folder: a saved model, a PEFT adapter, or a checkpoint of the trainer; or a delta.
        dtype: "auto" for that of the checkpoint, or a name of torch's.
        device: where to; None for the accelerator, else the CPU.
        flag: what to call the argument in an error.
        base: the model that a delta is of; None for the one that it names.

    Raises:
        ValueError: there is no such model, or it cannot be loaded.
    """
    place = _device(device)
    with _named_where_it_fails(name, flag):
        source = (base or DeltaFile(name).base) if names_delta(name) else name
        model = _load_model(name, dtype, source)
        tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.eos_token is None:
        raise ValueError(f"{flag} {name!r}: its tokenizer has no end-of-text token, at which generation would stop")
    return Loaded(name, model.to(place).eval(), tokenizer)


def names_delta(name: str) -> bool:
    """Tell whether a model is named by the file of a delta."""
    return Path(name).is_file() and is_delta(name)


def _load_model(name: str, dtype: str, source: str) -> PreTrainedModel:
    """Load by what the path is; a further kind of file or folder gets its branch here."""
    path = Path(name)
    if names_delta(name):
        return _delta(path, source, dtype)
    if path.is_file():
        raise ValueError("it is a file, and no delta; give a folder, a delta, or a name on the Hub")
    if not path.is_dir():
        if name.startswith((".", "/", "~")):
            raise ValueError("there is no such folder")
        return _pretrained(name, dtype)
    if (path / _ADAPTER).is_file():
        return _adapter(path, dtype)
    if any(any(path.glob(pattern)) for pattern in _WEIGHTS):
        return _pretrained(name, dtype)
    if any(path.glob("global_step*")):
        return _sharded(path, dtype)
    inside = sorted(folder.name for folder in path.glob("checkpoint-*") if folder.is_dir())
    hint = f"; name one of its checkpoints: {', '.join(inside)}" if inside else ""
    raise ValueError(f"the folder holds no weights ({', '.join(_WEIGHTS)}){hint}")


def _pretrained(name: str, dtype: str) -> PreTrainedModel:
    model, found = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True)
    _check_complete(found)
    return model


def _check_complete(found: dict[str, Any]) -> None:
    if found["missing_keys"]:  # transformers draws them at random and goes on
        raise ValueError(f"its weights lack {sorted(found['missing_keys'])[0]}")


def _delta(file: Path, base: str, dtype: str) -> PreTrainedModel:
    """Load a base with a delta applied, in memory: the base's tensors are checked, and the disk holds no new ones."""
    weights = dict(TunedModel(base, [file]).state())
    generation = None
    with contextlib.suppress(OSError):  # not every model has settings for it
        generation = GenerationConfig.from_pretrained(base)
    config = AutoConfig.from_pretrained(base)
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(config))
    # Not load_state_dict: some models have other tensors in memory than in their files.
    model, found = kind.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, generation_config=generation, output_loading_info=True
    )
    _check_complete(found)
    return model


def _adapter(folder: Path, dtype: str) -> PreTrainedModel:
    """Load the base that an adapter names, with the adapter beside its weights."""
    try:
        from peft import PeftConfig
    except ImportError as missing:
        raise ValueError(f"it is a PEFT adapter, and PEFT is not installed ({missing}): pip install peft") from None
    base = PeftConfig.from_pretrained(folder).base_model_name_or_path
    if base is None:
        raise ValueError(f"its {_ADAPTER} names no base model")
    model = _pretrained(base, dtype)
    if model.load_adapter(str(folder)).missing_keys:
        raise ValueError(
            "its adapter holds not all tensors, as in the checkpoints of ZeRO stage 3; name the folder that training "
            "has saved at its end, or train in another stage"
        )
    return model


def _sharded(folder: Path, dtype: str) -> PreTrainedModel:
    """Load a checkpoint of ZeRO that holds no plain weights, as stage 3 writes it."""
    if not (folder / checkpoint.DESCRIPTION).is_file():
        raise ValueError(
            f"it is a checkpoint of DeepSpeed without plain weights; write them first, by `python {folder}/"
            f"zero_to_fp32.py {folder} OUT --safe_serialization`, and copy config.json and the tokenizer to OUT"
        )
    if checkpoint.read(folder)["universal"]:
        raise ValueError("it is a universal checkpoint, without plain weights; name the one it was converted from")
    # Needs DeepSpeed, which nothing else here does.
    from lift_ds.zero.plain_weights import plain_state_dict

    with contextlib.redirect_stdout(sys.stderr):  # it prints what it reads
        weights = plain_state_dict(str(folder))
    config = AutoConfig.from_pretrained(folder)
    kind = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    model = AutoModelForCausalLM.from_config(config, dtype=kind)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    model.tie_weights()
    odd = [*unexpected, *(set(missing) - set(model.all_tied_weights_keys))]
    if odd:
        raise ValueError(f"its weights do not fit its config.json: {odd[0]} is in one of them alone")
    return model


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


@contextlib.contextmanager
def _named_where_it_fails(name: str, flag: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{flag} {name!r} cannot be loaded: {reason}") from error


@contextlib.contextmanager
def greedy(model: PreTrainedModel) -> Iterator[None]:
    """Generate without what a model's own configuration asks for, such as sampling or a repetition penalty.

    Args:
        model: has its configuration again afterwards, and the mode it was in.
    """
    own, was_training = model.generation_config, model.training
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    model.generation_config = GenerationConfig(do_sample=False, **{name: getattr(own, name) for name in tokens})
    model.eval()
    try:
        yield
    finally:
        model.generation_config = own
        model.train(was_training)
