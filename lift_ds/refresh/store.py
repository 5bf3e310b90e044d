"""PrincipalStore: where the weights, indices, master values and moments of a run are, and how they are reached.

`DenseStore` is for a process that has all of them. Those for DeepSpeed's ways are in `lift_ds.zero.stores`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lift_ds.index.access import access_to
from lift_ds.index.encoding import CompactIndex
from lift_ds.model.layers import PrincipalLayer
from lift_ds.refresh.carry import MOMENTS, PrincipalState, carry_over

#: Entries of θ that a write-back under ZeRO-3 gathers at a time, in fewer collectives than matrices.
WRITE_BACK_BATCH = 2**25


@dataclass(frozen=True)
class NewIndex:
    """The new index of one matrix, as its owner hands it out.

    Args:
        words: the index, encoded.
        current: the current weights there [k]; None where every rank has the matrix.
    """

    words: Tensor
    current: Tensor | None


class PrincipalStore(Protocol):
    """Where the weights, indices, master values and moments of a run live, on N ranks."""

    rank: int
    ranks: int
    #: Whether θ is away from its layer between steps (ZeRO-3).
    sharded: bool
    #: Whether θ is what the optimizer updates, and not rounded from a master value apart.
    values_are_master: bool

    def collect(self, layer: PrincipalLayer, owner: int) -> Tensor | None:
        """Return the whole weight [m, n] on the owner, None on the other ranks; all of them call."""

    def choose(self, layer: PrincipalLayer, weight: Tensor, index: Tensor) -> NewIndex:
        """Return what the owner is to hand out: the new index [k] of its whole weight."""

    def hand_out(self, layer: PrincipalLayer, owner: int, selection: NewIndex | None) -> NewIndex:
        """Return the owner's selection on every rank; None is given on the others."""

    def agree(self, failure: str, numbers: Sequence[float]) -> list[list[float]]:
        """Return the numbers of all ranks.

        Raises:
            ValueError: on every rank, if any of them gives a failure; with the first one's text.
        """

    def on_any_rank(self, flags: Sequence[bool]) -> list[bool]:
        """Return for each flag whether it is set on any rank; all of them call."""

    def whole_index(self, layer: PrincipalLayer) -> AbstractContextManager[object]:
        """Make the index of a layer whole on every rank within the context."""

    def turns(self, layers: Sequence[PrincipalLayer]) -> list[list[PrincipalLayer]]:
        """Return the layers in the order in which they are carried over, alike on all ranks; those of a turn together.

        Each rank holds the new indices of a turn at once, so there are few in it.
        """

    def carry(self, new: Sequence[tuple[PrincipalLayer, NewIndex]]) -> int:
        """Store new indices that were handed out; the state of what stays moves to where it is held from now on.

        θ takes the values at the new index, on every rank that has it. All ranks call.

        Args:
            new: the layers of a turn, and their new indices.

        Returns:
            How many of the entries that this rank holds are new.
        """

    def total(self, count: int) -> int:
        """Return the sum of what all ranks give; all of them call."""

    def write_back(self, layers: Sequence[PrincipalLayer]) -> None:
        """W.flat[I] = θ, wherever W lives."""

    def compare(self, layers: Sequence[PrincipalLayer], *, write_first: bool) -> Tensor:
        """Compare the weights at I with the master values, in the dtype of the weights; nothing is changed.

        Args:
            layers: to compare in.
            write_first: write back before, in the same pass.

        Returns:
            int64 [len(layers), 2], the same on every rank: how many entries differ, how many master values were found.
        """

    def release(self) -> None:
        """Give up what was kept whole between a backward and its step."""

    def end_backward(self, layers: Iterable[PrincipalLayer]) -> None:
        """Give up what a backward through some layers has left whole; in training the engine does so."""


class DenseStore:
    """Everything whole in this process: plain PyTorch, or DeepSpeed's stage 0 in float32.

    Args:
        optimizer: the Adam that holds θ in its parameter groups; θ is its own master.
    """

    rank, ranks, sharded = 0, 1, False
    values_are_master = True

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def collect(self, layer: PrincipalLayer, owner: int) -> Tensor | None:
        return layer.weight.detach()

    def choose(self, layer: PrincipalLayer, weight: Tensor, index: Tensor) -> NewIndex:
        return NewIndex(layer.principal.index.encode(index), None)

    def hand_out(self, layer: PrincipalLayer, owner: int, selection: NewIndex | None) -> NewIndex:
        assert selection is not None, "one process owns every matrix"
        return selection

    def agree(self, failure: str, numbers: Sequence[float]) -> list[list[float]]:
        if failure:
            raise ValueError(failure)
        return [list(numbers)]

    def on_any_rank(self, flags: Sequence[bool]) -> list[bool]:
        return list(flags)

    def whole_index(self, layer: PrincipalLayer) -> AbstractContextManager[object]:
        return nullcontext()

    def master(self, layer: PrincipalLayer) -> Tensor:
        """Return the tensor that the optimizer updates for this layer."""
        return layer.principal_values

    def turns(self, layers: Sequence[PrincipalLayer]) -> list[list[PrincipalLayer]]:
        return [[layer] for layer in layers]

    def carry(self, new: Sequence[tuple[PrincipalLayer, NewIndex]]) -> int:
        return sum(self._carry(layer, selection) for layer, selection in new)

    @torch.no_grad()
    def _carry(self, layer: PrincipalLayer, selection: NewIndex) -> int:
        new_index = layer.principal.index.decode(selection.words)
        current = layer.weight.detach().view(-1)[new_index.long()]  # [k]
        state, replaced = carry_over(layer.principal_index, self._state(layer), new_index, current)
        master = self.master(layer)
        master.copy_(state.master)
        moments = self._optimizer.state.get(master, {})
        if moments:
            for key in MOMENTS:
                moments[key].copy_(getattr(state, key))
        layer.principal_values.copy_(state.master)
        layer.principal.index.words.copy_(selection.words)
        return replaced

    def total(self, count: int) -> int:
        return count

    def _state(self, layer: PrincipalLayer) -> PrincipalState:
        master = self.master(layer)
        moments = self._optimizer.state.get(master, {})
        # Adam has no state yet for a layer that no gradient has reached.
        exp_avg, exp_avg_sq = (moments.get(key, torch.zeros_like(master)) for key in MOMENTS)
        return PrincipalState(master.detach(), exp_avg, exp_avg_sq)

    def write_back(self, layers: Sequence[PrincipalLayer]) -> None:
        for layer in layers:
            put_values(layer.weight, layer.principal.index.compact(), layer.principal_values)

    def compare(self, layers: Sequence[PrincipalLayer], *, write_first: bool) -> Tensor:
        if write_first:
            self.write_back(layers)
        counts = []
        for layer in layers:
            held = weights_at(layer.weight, layer.principal.index.compact())
            counts.append((differences(held, self.master(layer)), layer.entries()))
        return torch.tensor(counts)

    def release(self) -> None:
        pass

    def end_backward(self, layers: Iterable[PrincipalLayer]) -> None:
        pass


def write_back_batches(entries: Sequence[int]) -> list[slice]:
    """Cut a sequence of matrices into the runs that are gathered together, of `WRITE_BACK_BATCH` entries or one matrix.

    Args:
        entries: k of each matrix.
    """
    batches: list[slice] = []
    start = total = 0
    for place, count in enumerate(entries):
        if place > start and total + count > WRITE_BACK_BATCH:
            batches.append(slice(start, place))
            start, total = place, 0
        total += count
    return [*batches, slice(start, len(entries))] if entries else []


def put_values(weight: Tensor, index: CompactIndex, values: Tensor) -> None:
    """W.flat[I] = θ, in place; a contiguous weight [m, n], its whole index, values [k] of any floating dtype."""
    access_to(index).put(weight.detach().view(-1), 0, values.detach())


@torch.no_grad()
def weights_at(weight: Tensor, index: CompactIndex) -> Tensor:
    """Return W.flat[I] [k], in the dtype of a contiguous weight [m, n]; its index is whole."""
    values = weight.new_empty(index.layout.entries)
    access_to(index).gather(weight.detach().view(-1), 0, values)
    return values


def differences(weights: Tensor, master: Tensor) -> Tensor:
    """Count the weights that are not their master values, rounded to the dtype of the weights; NaN equals NaN.

    Args:
        weights: any floating dtype.
        master: of the same shape, on any device.
    """
    rounded = master.detach().to(weights.device, weights.dtype)
    return ((weights != rounded) & ~(weights.isnan() & rounded.isnan())).count_nonzero()
