"""DeepSpeed's ways to take weights out of a run. With LIFT they give a plain model: no θ and no I, and W has the
trained values.

    engine.save_16bit_model(folder)                          the weights as they are now
    python CHECKPOINT/zero_to_fp32.py CHECKPOINT OUT         a checkpoint's weights, with the master values in float32
    python CHECKPOINT/zero_to_torch.py CHECKPOINT OUT --dtype bf16

The two scripts are DeepSpeed's, which it copies beside every checkpoint; here they are replaced by callers of this
module.
"""

from __future__ import annotations

import math
import os
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import zero_to_fp32, zero_to_torch
from torch import Tensor

from lift_ds import checkpoint
from lift_ds.index.access import access_to
from lift_ds.index.encoding import CompactIndex, IndexLayout
from lift_ds.model.weights import PRINCIPAL_KEYS, is_principal
from lift_ds.runtime.ranks import alone

#: File -> its content.
_SCRIPTS = {
    "zero_to_fp32.py": "with_dtype('fp32')",
    "zero_to_torch.py": "main()",
}
_SCRIPT = '''#!/usr/bin/env python
"""Writes the plain model of this checkpoint; --help says how."""

from lift_ds.zero import plain_weights

if __name__ == "__main__":
    plain_weights.{call}
'''


def replace_scripts(folder: Path | str) -> None:
    """Replace the scripts that DeepSpeed has copied beside a checkpoint; for one rank.

    Args:
        folder: where they are; those that are not there are not made.
    """
    for name, call in _SCRIPTS.items():
        path = Path(folder) / name
        if path.exists():
            path.write_text(_SCRIPT.format(call=call), encoding="utf-8")


def save_plain_16bit_models(engine: Any) -> None:
    """Let `engine.save_16bit_model` leave out what LIFT has added to the model.

    Args:
        engine: DeepSpeed's; its method is replaced.
    """
    engine.save_16bit_model = types.MethodType(_saver(engine.save_16bit_model), engine)


def _saver(save: Callable[..., bool]) -> Callable[..., bool]:
    def save_16bit_model(
        self: Any, save_dir: str, save_filename: str = "pytorch_model.bin", exclude_frozen_parameters: bool = False
    ) -> bool:
        if exclude_frozen_parameters:
            raise ValueError(
                "exclude_frozen_parameters=True would leave out the weights that LIFT has trained; leave it out"
            )
        collectors = ("module_state_dict", "_zero3_consolidated_16bit_state_dict")
        originals = {name: getattr(self, name) for name in collectors}
        for name, collect in originals.items():
            setattr(self, name, _plain(collect))
        try:
            return save(save_dir, save_filename)
        finally:
            for name, collect in originals.items():
                setattr(self, name, collect)

    return save_16bit_model


def _plain(collect: Callable[..., Any]) -> Callable[..., Any]:
    def collected(*args: Any, **kwargs: Any) -> Any:
        state = collect(*args, **kwargs)  # None on all ranks but one, in stage 3
        return _without(state) if state else state

    return collected


def _without(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict without the keys that LIFT has added."""
    return {key: value for key, value in state.items() if not is_principal(key)}


@dataclass
class _TrainedWeight:
    """A weight whose principal entries take their master values when it is read; what DeepSpeed's converter calls a
    lazy tensor."""

    weight: Any
    values: Any
    words: Any
    block_shape: tuple[int, int]
    matrices: int
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.weight.shape)

    def contiguous(self) -> Tensor:
        weight, values = self.weight.contiguous().float(), self.values.contiguous().float()
        rows = math.prod(weight.shape[:2]) if self.matrices > 1 else weight.shape[0]
        layout = IndexLayout(rows, weight.numel() // rows, values.numel(), self.block_shape, self.matrices)
        access_to(CompactIndex(self.words.contiguous(), layout)).put(weight.view(-1), 0, values.view(-1))
        return weight


def plain_state_dict(
    checkpoint_dir: str, tag: str | None = None, exclude_frozen_parameters: bool = False, lazy_mode: bool = False
) -> dict[str, Any]:
    """Return the plain weights of a checkpoint of ZeRO stage 1 to 3; takes the place of DeepSpeed's function.

    Args:
        checkpoint_dir: a `checkpoint-<step>` folder of a Trainer, or the folder of the tags of `lift_ds.initialize`.
        tag: of the checkpoint; the last one if None.
        exclude_frozen_parameters: would leave out what LIFT has trained.
        lazy_mode: give tensors that are read when their `contiguous()` is called.

    Returns:
        Name -> tensor, with the names of the plain model. Floating tensors that LIFT has trained are float32.

    Raises:
        ValueError: it is no whole checkpoint of LIFT.
    """
    if exclude_frozen_parameters:
        raise ValueError("--exclude_frozen_parameters would leave out the weights that LIFT has trained; leave it out")
    with alone():
        description = checkpoint.read(_described(checkpoint_dir, tag))
    blocks: Any = tuple(description["config"]["block_shape"])
    whole = _deepspeeds_state_dict(checkpoint_dir, tag, lazy_mode=True)
    plain = _without(whole)
    for name, about in description["matrices"].items():
        # A weight goes by the name of its module where that calls it "weight".
        full_name, before = (f"{name}.weight", f"{name}.") if f"{name}.weight" in plain else (name, f"{name}_")
        values, words = (whole[before + key] for key in PRINCIPAL_KEYS)
        plain[full_name] = _TrainedWeight(plain[full_name], values, words, blocks, about.get("matrices", 1))
    return plain if lazy_mode else zero_to_fp32.to_torch_tensor(plain)


_deepspeeds_state_dict = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint


def _described(checkpoint_dir: str, tag: str | None) -> str:
    """Return the folder that has the checkpoint's description."""
    if os.path.isfile(os.path.join(checkpoint_dir, checkpoint.DESCRIPTION)):
        return checkpoint_dir
    if tag is None:
        latest = Path(checkpoint_dir) / "latest"
        if not latest.is_file():
            raise ValueError(f"{latest} is missing: name the checkpoint by --tag")
        tag = latest.read_text().strip()
    return os.path.join(checkpoint_dir, tag)


def main(arguments: list[str] | None = None) -> None:
    """Run DeepSpeed's converter over the plain weights.

    Args:
        arguments: those of DeepSpeed's zero_to_torch.py; of the process if None.
    """
    zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint = plain_state_dict
    zero_to_torch.main(arguments)


def with_dtype(dtype: str) -> None:
    """Run `main` on the arguments of the process, with a dtype of the result."""
    main([*sys.argv[1:], "--dtype", dtype])
