"""Parameters that are not whole on this rank: what LIFT has to know of them, and who knows it.

A plain parameter is whole everywhere. A library that shards parameters gives LIFT a `Partition` of its own; that of
DeepSpeed's ZeRO-3 is in `lift_ds.zero.partitioned`. It is imported when the first parameter of its kind is met.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from lift_ds.runtime.ranks import rank_and_count


class Partition(Protocol):
    """How parameters of one kind are shared out over the ranks."""

    def shape(self, parameter: Any) -> torch.Size:
        """Return the shape of the whole parameter."""

    def gathered(self, parameters: Sequence[Any]) -> AbstractContextManager[object]:
        """Make parameters whole on every rank within the context, for reading; all ranks call."""

    def collected(self, parameter: Any, owner: int, span: tuple[int, int]) -> Tensor | None:
        """Return flat positions [start, stop) of a parameter on the owner, for reading, 1-D; None on the other ranks.

        All of them call.
        """

    def partition_like(self, parameter: Any, others: Sequence[Tensor]) -> None:
        """Share new parameters out as `parameter` is, as rank 0 has them; all ranks call."""


class Whole:
    """The parameters of a plain model: nothing is shared out."""

    def shape(self, parameter: Tensor) -> torch.Size:
        return parameter.shape

    def gathered(self, parameters: Sequence[Tensor]) -> AbstractContextManager[object]:
        return nullcontext()

    def collected(self, parameter: Tensor, owner: int, span: tuple[int, int]) -> Tensor | None:
        return parameter.detach().view(-1)[slice(*span)] if rank_and_count()[0] == owner else None

    def partition_like(self, parameter: Tensor, others: Sequence[Tensor]) -> None:
        pass


_WHOLE = Whole()

#: Attribute by which a sharded parameter is known -> the module whose `PARTITION` is for it.
_KINDS = {"ds_id": "lift_ds.zero.partitioned"}


def partition_of(parameter: Tensor) -> Partition:
    """Return how a parameter is shared out over the ranks."""
    for attribute, module in _KINDS.items():
        if hasattr(parameter, attribute):
            return importlib.import_module(module).PARTITION
    return _WHOLE


def is_partitioned(parameter: Tensor) -> bool:
    """Tell whether a parameter is shared out over the ranks, even if it is whole at this moment."""
    return partition_of(parameter) is not _WHOLE


def logical_shape(parameter: Tensor) -> torch.Size:
    """Return the shape of a parameter, also where this rank holds a part of it only."""
    return partition_of(parameter).shape(parameter)
