"""The index in ZeRO stages 1 and 2: 1/N on each rank, whole from a layer's backward to its write-back.

                    rank 0          rank 1                        both
    between steps   words[: w/2]    words[w/2 :]
    backward of l                                  all words of l (their gather began in the backward before)
    write-back      W.flat[I] = θ; then each keeps its own part again

The gathers of one step run in the order in which backward reaches the layers. That order has to be the same on every
rank, as ZeRO's own reduction of the gradients needs it to be. That is checked at each gather of the first step, and at
each refresh for all steps before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed import comm
from torch import Tensor

from lift_ds.model.parameters import PrincipalIndex
from lift_ds.runtime.ranks import shard_size

_SAME_ORDER = (
    "ZeRO 1 and 2 reduce gradients in the order of backward, which has to be the same on every rank, also without "
    "LIFT: let all ranks run the same layers, or use ZeRO stage 0"
)


class ShardedIndex:
    """Holds 1/N of the words of each index; fetches and releases them around each use.

    Args:
        indices: by the name of the managed layer, whole on every rank; afterwards their words are empty.
        group: the N data-parallel ranks.
        keep: tells during a backward whether a step follows it, so that what was gathered is kept for the write-back.
    """

    def __init__(self, indices: Mapping[str, PrincipalIndex], group: Any, keep: Callable[[], bool]) -> None:
        self._group = group
        self._rank, self._ranks = comm.get_rank(group=group), comm.get_world_size(group=group)
        self._keep = keep
        self._shards: dict[PrincipalIndex, Tensor] = {}
        self._in_flight: dict[PrincipalIndex, tuple[Tensor, Any]] = {}
        # What backward fetched in this step and in the one before, and whether they agree so far.
        self._fetched: list[PrincipalIndex] = []
        self._expected: list[PrincipalIndex] = []
        self._as_expected = True
        self._names = list(indices)
        self._numbers = {index: number for number, index in enumerate(indices.values())}
        self._first_step = True
        self._order = 0  # of all that backward fetched, as one number
        for index in indices.values():
            self.store(index, index.words.detach())
            index.register_forward_pre_hook(self._before_use)
            index.register_forward_hook(self._after_use)

    @torch.no_grad()
    def store(self, index: PrincipalIndex, words: Tensor) -> None:
        """Keep this rank's part of words that every rank has whole; no collective runs."""
        size = shard_size(words.numel(), self._ranks)
        part = words[size * self._rank : size * (self._rank + 1)]
        shard = words.new_zeros(size)
        shard[: part.numel()] = part
        self._shards[index] = shard
        self._empty(index)

    @contextmanager
    def whole(self, index: PrincipalIndex) -> Iterator[None]:
        """Make one index whole on every rank within the context (one all-gather, unless it is whole already)."""
        was_whole = bool(index.words.numel())
        self.fetch(index)
        try:
            yield
        finally:
            if not was_whole:
                self.release(index)

    def fetch(self, index: PrincipalIndex) -> None:
        """Make an index whole on every rank; one all-gather, none if it is whole or on its way."""
        if index.words.numel():
            return
        words, handle = self._in_flight.pop(index) if index in self._in_flight else self._begin(index)
        handle.wait()
        index.words.data = words

    def release(self, index: PrincipalIndex) -> None:
        """Keep this rank's part alone of an index that was not changed."""
        self._empty(index)

    def release_all(self) -> None:
        """End a step: keep this rank's parts alone, and remember in which order backward used them."""
        for index in list(self._in_flight):  # fetched ahead for a layer that this backward did not reach
            self.fetch(index)
        for index in self._shards:
            self._empty(index)
        self._first_step &= not self._fetched
        self._expected, self._fetched, self._as_expected = self._fetched, [], True

    def require_same_order(self) -> None:
        """Check that backward has reached the layers in the same order on all ranks so far; one all-gather.

        Raises:
            RuntimeError: on every rank, when it has not.
        """
        if len(set(self._of_all_ranks(self._order))) > 1:
            raise RuntimeError(f"the ranks ran their layers in different orders since the last refresh; {_SAME_ORDER}")

    def _require_same_layer(self, index: PrincipalIndex) -> None:
        numbers = self._of_all_ranks(self._numbers[index])
        if len(set(numbers)) > 1:
            found = ", ".join(f"rank {rank} {self._names[number]}" for rank, number in enumerate(numbers))
            raise RuntimeError(f"the ranks run different layers at the same time in backward: {found}; {_SAME_ORDER}")

    def _of_all_ranks(self, number: int) -> list[int]:
        mine = torch.tensor([number], device=self._shards[next(iter(self._shards))].device)
        everyone = mine.new_empty(self._ranks)
        comm.all_gather_into_tensor(everyone, mine, group=self._group)
        return everyone.tolist()

    def make_whole(self) -> None:
        """Make every index whole on every rank, as a checkpoint holds them."""
        for index in self._shards:
            self.fetch(index)

    def shard_again(self) -> None:
        """Keep this rank's parts of indices that are all whole, and may have been changed by a loaded checkpoint."""
        for index in self._shards:
            self.store(index, index.words.detach())

    def _empty(self, index: PrincipalIndex) -> None:
        index.words.data = index.words.new_empty(0)

    def _begin(self, index: PrincipalIndex) -> tuple[Tensor, Any]:
        shard = self._shards[index]
        words = shard.new_empty(shard.numel() * self._ranks)
        handle = comm.all_gather_into_tensor(words, shard, group=self._group, async_op=True)
        return words[: index.word_count()], handle

    def _before_use(self, index: PrincipalIndex, arguments: Any) -> None:
        if index.words.numel():
            return
        if self._first_step:
            self._require_same_layer(index)
        self._order = hash((self._order, self._numbers[index]))
        self.fetch(index)
        place = len(self._fetched)
        self._as_expected &= self._expected[place : place + 1] == [index]
        self._fetched.append(index)
        if self._as_expected:
            self._look_ahead(self._expected[place + 1 : place + 2])

    def _look_ahead(self, following: Sequence[PrincipalIndex]) -> None:
        for index in following:
            if not index.words.numel() and index not in self._in_flight:
                self._in_flight[index] = self._begin(index)

    def _after_use(self, index: PrincipalIndex, arguments: Any, positions: Any) -> None:
        if not self._keep():
            self.release(index)
