"""PrincipalStore: where the weights, indices, master values and moments of a run are, and how they are reached.

`DenseStore` is for a process that has all of them. Those for DeepSpeed's ways are in `lift_ds.zero.stores`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lift_ds.index.access import access_to
from lift_ds.index.encoding import CompactIndex, stacked
from lift_ds.model.weights import PrincipalWeight
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

    def collect(self, weight: PrincipalWeight, number: int, owner: int) -> Tensor | None:
        """Return a whole matrix [m, n] of a weight on the owner, None on the other ranks; all of them call."""

    def choose(self, weight: PrincipalWeight, matrix: Tensor, index: Tensor) -> NewIndex:
        """Return what the owner is to hand out: the new index [k] of its whole matrix."""

    def hand_out(self, weight: PrincipalWeight, owner: int, selection: NewIndex | None) -> NewIndex:
        """Return the owner's selection in a matrix of a weight on every rank; None is given on the others."""

    def agree(self, failure: str, numbers: Sequence[float]) -> list[list[float]]:
        """Return the numbers of all ranks.

        Raises:
            ValueError: on every rank, if any of them gives a failure; with the first one's text.
        """

    def on_any_rank(self, flags: Sequence[bool]) -> list[bool]:
        """Return for each flag whether it is set on any rank; all of them call."""

    def whole_index(self, weight: PrincipalWeight) -> AbstractContextManager[object]:
        """Make the index of a weight whole on every rank within the context."""

    def turns(self, weights: Sequence[PrincipalWeight]) -> list[list[PrincipalWeight]]:
        """Return the weights in the order in which they are carried over, alike on all ranks; those of a turn together.

        Each rank holds the new indices of a turn at once, so there are few in it.
        """

    def carry(self, new: Sequence[tuple[PrincipalWeight, Sequence[NewIndex]]]) -> int:
        """Store new indices that were handed out; the state of what stays moves to where it is held from now on.

        θ takes the values at the new index, on every rank that has it. All ranks call.

        Args:
            new: the weights of a turn, and the new indices of the matrices of each.

        Returns:
            How many of the entries that this rank holds are new.
        """

    def total(self, count: int) -> int:
        """Return the sum of what all ranks give; all of them call."""

    def write_back(self, weights: Sequence[PrincipalWeight]) -> None:
        """W.flat[I] = θ, wherever W lives."""

    def compare(self, weights: Sequence[PrincipalWeight], *, write_first: bool) -> Tensor:
        """Compare the weights at I with the master values, in the dtype of the weights; nothing is changed.

        Args:
            weights: to compare in.
            write_first: write back before, in the same pass.

        Returns:
            int64 [len(weights), 2], the same on every rank: how many entries differ, how many master values were found.
        """

    def held(self, parameter: Tensor, *, write: bool) -> AbstractContextManager[tuple[Tensor, int]]:
        """Give the part of a parameter that this rank holds, within the context: 1-D, and its first flat position.

        Autograd does not notice what is written into it. Afterwards `drop_gathered` is called, on all ranks.

        Args:
            parameter: of the model.
            write: whether it is written into.
        """

    def drop_gathered(self) -> None:
        """Let parameters be gathered anew where they are needed; no collective runs here."""

    def trained(self, weight: PrincipalWeight) -> tuple[Tensor, Tensor]:
        """Return the index [k] of a weight and the weights there [k], on every rank; all of them call."""

    def of_all_parts(self, weight: PrincipalWeight, piece: Tensor) -> Tensor:
        """Return what the ranks that share a copy of a weight have of something, in their order; all of them call.

        Args:
            weight: that is shared out.
            piece: what this rank has in the part that it holds, 1-D.
        """

    def has_first_copy(self, weight: PrincipalWeight) -> bool:
        """Tell whether what this rank holds of a weight is of the first copy; where there are more, they are alike."""

    def release(self) -> None:
        """Give up what was kept whole between a backward and its step."""

    def end_backward(self, weights: Iterable[PrincipalWeight]) -> None:
        """Give up what a backward through some weights has left whole; in training the engine does so."""


class WholeWeights(ABC):
    """What stores have in common where each rank holds all weights."""

    rank: int

    @contextmanager
    def held(self, parameter: Tensor, *, write: bool) -> Iterator[tuple[Tensor, int]]:
        yield parameter.data.view(-1), 0  # by `data`: autograd would count what is written

    def drop_gathered(self) -> None:
        """Nothing is gathered."""
        return

    def trained(self, weight: PrincipalWeight) -> tuple[Tensor, Tensor]:
        with self.whole_index(weight):
            index = weight.principal.index.compact()
            return index.positions().clone(), weights_at(weight.weight, index)

    def of_all_parts(self, weight: PrincipalWeight, piece: Tensor) -> Tensor:
        return piece

    def has_first_copy(self, weight: PrincipalWeight) -> bool:
        return self.rank == 0

    @abstractmethod
    def whole_index(self, weight: PrincipalWeight) -> AbstractContextManager[object]:
        """As `PrincipalStore`."""


class DenseStore(WholeWeights):
    """Everything whole in this process: plain PyTorch, or DeepSpeed's stage 0 in float32.

    Args:
        optimizer: the Adam that holds θ in its parameter groups; θ is its own master.
    """

    rank, ranks, sharded = 0, 1, False
    values_are_master = True

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def collect(self, weight: PrincipalWeight, number: int, owner: int) -> Tensor | None:
        return matrix_of(weight, number)

    def choose(self, weight: PrincipalWeight, matrix: Tensor, index: Tensor) -> NewIndex:
        return NewIndex(weight.principal.index.encode(index), None)

    def hand_out(self, weight: PrincipalWeight, owner: int, selection: NewIndex | None) -> NewIndex:
        assert selection is not None, "one process owns every matrix"
        return selection

    def agree(self, failure: str, numbers: Sequence[float]) -> list[list[float]]:
        if failure:
            raise ValueError(failure)
        return [list(numbers)]

    def on_any_rank(self, flags: Sequence[bool]) -> list[bool]:
        return list(flags)

    def whole_index(self, weight: PrincipalWeight) -> AbstractContextManager[object]:
        return nullcontext()

    def master(self, weight: PrincipalWeight) -> Tensor:
        """Return the tensor that the optimizer updates for this weight."""
        return weight.principal_values

    def turns(self, weights: Sequence[PrincipalWeight]) -> list[list[PrincipalWeight]]:
        return [[weight] for weight in weights]

    @torch.no_grad()
    def carry(self, new: Sequence[tuple[PrincipalWeight, Sequence[NewIndex]]]) -> int:
        replaced = 0
        for weight, selections in new:
            for number, selection in enumerate(selections):
                replaced += self._carry(weight, number, selection)
            words = stacked([selection.words for selection in selections], weight.layout)
            weight.principal.index.words.copy_(words)
            weight.principal_values.copy_(self.master(weight))
        return replaced

    def _carry(self, weight: PrincipalWeight, number: int, selection: NewIndex) -> int:
        """Carry the state of one matrix over; return how many entries are new."""
        old = weight.principal.index.compact().of_matrix(number)
        new_index = CompactIndex(selection.words, old.layout).positions()
        current = matrix_of(weight, number).view(-1)[new_index.long()]  # [k]
        own = slice(number * current.numel(), (number + 1) * current.numel())
        held = PrincipalState(*(tensor[own] for tensor in self._state(weight)))
        carried, replaced = carry_over(old.positions(), held, new_index, current)
        for tensor, value in zip(held, carried, strict=True):
            tensor.copy_(value)
        return replaced

    def total(self, count: int) -> int:
        return count

    def _state(self, weight: PrincipalWeight) -> PrincipalState:
        master = self.master(weight).detach()
        moments = self._optimizer.state.get(self.master(weight), {})
        # Adam has no state yet for a weight that no gradient has reached; what is written into these is not kept.
        exp_avg, exp_avg_sq = (moments.get(key, torch.zeros_like(master)) for key in MOMENTS)
        return PrincipalState(master, exp_avg, exp_avg_sq)

    def write_back(self, weights: Sequence[PrincipalWeight]) -> None:
        for weight in weights:
            put_values(weight.weight, weight.principal.index.compact(), weight.principal_values)

    def compare(self, weights: Sequence[PrincipalWeight], *, write_first: bool) -> Tensor:
        if write_first:
            self.write_back(weights)
        counts = []
        for weight in weights:
            held = weights_at(weight.weight, weight.principal.index.compact())
            counts.append((differences(held, self.master(weight)), weight.entries()))
        return torch.tensor(counts)

    def release(self) -> None:
        pass

    def end_backward(self, weights: Iterable[PrincipalWeight]) -> None:
        pass


def matrix_of(weight: PrincipalWeight, number: int) -> Tensor:
    """Return a matrix [m, n] of a weight that is whole."""
    rows, columns = weight.shape()
    whole: Tensor = weight.weight.detach().view(weight.matrices, rows, columns)
    return whole[number]


def write_back_batches(entries: Sequence[int]) -> list[slice]:
    """Cut a sequence of weights into the runs that are gathered together, of `WRITE_BACK_BATCH` entries or one weight.

    Args:
        entries: k of each weight.
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
    """W.flat[I] = θ, in place; a contiguous weight, its whole index, values [k] of any floating dtype."""
    access_to(index).put(weight.detach().view(-1), 0, values.detach())


@torch.no_grad()
def weights_at(weight: Tensor, index: CompactIndex) -> Tensor:
    """Return W.flat[I] [k], in the dtype of a contiguous weight; its index is whole."""
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
