"""The principal values and indices as a file of a checkpoint, for a Trainer without DeepSpeed.

The model that it saves is a plain one, and DeepSpeed, which saves them elsewhere, is not there.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lift_ds.model.attachment import principal_keys, require_attachment

#: Name of the file: θ and the words of I of each managed weight, by their names in the model's state dict.
FILE = "lift_principal.safetensors"


def write(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write θ and I into a checkpoint folder; for one rank.

    Args:
        model: the model LIFT is attached to, whole on this rank.
        directory: an existing folder.

    Raises:
        OSError: when the file cannot be written.
    """
    try:
        save_file({key: tensor.contiguous() for key, tensor in _tensors(model).items()}, Path(directory) / FILE)
    except SafetensorError as error:
        raise OSError(str(error)) from error


@torch.no_grad()
def restore(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Take θ and I out of a checkpoint folder; nothing happens where it has none, as those that DeepSpeed saved.

    Args:
        model: the model LIFT is attached to, whole on this rank.
        directory: a verified checkpoint.
    """
    path = Path(directory) / FILE
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            for key, tensor in _tensors(model).items():
                tensor.copy_(file.get_tensor(key))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for weight in require_attachment(model).weights.values():
        values, words = weight.principal.values, weight.principal.index.words
        found |= zip(principal_keys(weight), (values.detach(), words.detach()), strict=True)
    return found
