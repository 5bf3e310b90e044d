"""A delta as the patches that vLLM takes while it serves the base."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lift_ds.delta.file import DeltaFile


class CheckpointWeightPatch(NamedTuple):
    """What changed in one tensor, with the fields of vLLM's class of this name, in their order.

    A tuple, as there, since vLLM renames patches of tied weights by `_replace`.

    Attributes:
        name: of the tensor in the model's files.
        shape: of the whole tensor.
        dtype: of the values.
        values: flat; the new ones at `indices`, or all of the tensor.
        indices: flat positions, ascending, int32 or int64; None where `values` are all.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: Tensor
    indices: Tensor | None = None


def read_patches(file: str | Path) -> Iterator[CheckpointWeightPatch]:
    """Read a delta as patches, one after the other.

    Args:
        file: a delta, as `export_delta` writes it.

    Returns:
        A patch for each tensor that changed. Tensors that are removed have none.

    Raises:
        ValueError: it is no delta, or is damaged.
    """
    delta = DeltaFile(file)
    for name in delta.stored():
        indices, values = delta.read(name)
        yield CheckpointWeightPatch(name, delta.changes[name].shape, values.dtype, values, indices)
