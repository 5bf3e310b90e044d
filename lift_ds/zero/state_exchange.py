"""Master values and moments in a refresh: from the rank that holds an entry to the one that will hold it.

    rank 0 held    2 5 7      gets 1 2 5     keeps 2 and 5, sends 7 to rank 1; 1 starts from its weight
    rank 1 held    8 9 12     gets 7 8 12    keeps 8 and 12

Ranks hold ranges of the index, so few entries cross: about as many as came in before the end of a range more than had
dropped out there. No rank ever has the state of a whole matrix.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm
from torch import Tensor

from lift_ds.index.encoding import CompactIndex
from lift_ds.refresh.carry import Found, PrincipalState, Range, found_in, holders, outside, state_of


@dataclass(frozen=True)
class Held:
    """The states of one matrix, of which this rank holds a range.

    Args:
        old: the index they belong to, whole.
        state: that of this rank's range of it, on any device.
        new: the index they are to belong to, whole.
        current: the weights at this rank's range of the new index.
        ranges: of each rank, in both indices.
    """

    old: CompactIndex
    state: PrincipalState
    new: CompactIndex
    current: Tensor
    ranges: Sequence[Range]


@dataclass(frozen=True)
class _Move:
    """What happens to the states that a rank holds of one matrix.

    Args:
        coming: the entries of its new range that stay, by where they have been held.
        stayed: float32 [3, s], those of them that this rank has held itself.
        rows: float32 [t, 3], what leaves it, in the order of the ranks.
        leaving: for each rank how many rows go there.
    """

    coming: Found
    stayed: Tensor
    rows: Tensor
    leaving: list[int]


@torch.no_grad()
def carry_between(matrices: Sequence[Held], group: Any) -> Iterator[tuple[PrincipalState, int]]:
    """Carry the states of some matrices over from one selection to the next.

    All ranks of the group call, and iterate to the end. One all-to-all of 12 bytes for each entry that changes its
    rank; none where each matrix is held by one rank.

    Args:
        matrices: the same ones on all ranks.
        group: of these ranks.

    Yields:
        For each matrix the state of this rank's range of the new index, on the device of the index, and how many of its
        entries are new. One at a time, so that a rank never holds the new states of two.
    """
    rank = comm.get_rank(group=group)
    moves = deque(_move(one, rank) for one in matrices)
    arrived: Iterable[Tensor | None] = [None] * len(moves)
    if any(holders(one.ranges) > 1 for one in matrices):
        arrived = _exchanged(moves, rank, group)
    for one, others in zip(matrices, arrived, strict=True):
        move = moves.popleft()
        stayed, replaced = move.stayed, one.current.numel() - move.coming.places.numel()
        if others is not None and others.numel():
            first = sum(move.coming.holders[:rank])
            stayed = torch.cat([others[:, :first], stayed, others[:, first:]], dim=1)
        yield state_of(one.current, stayed, move.coming.places), replaced


def _move(one: Held, rank: int) -> _Move:
    """Find what stays with this rank, what comes to it and what leaves it."""
    start, stop = one.ranges[rank]
    if start == stop:
        nothing = one.current.new_empty(3, 0, dtype=torch.float32)
        none = [0] * len(one.ranges)
        places = torch.empty(0, dtype=torch.int64, device=one.current.device)
        return _Move(Found(places, places, none), nothing, nothing.T, none)
    old_index, new_index = one.old.positions(), one.new.positions()
    old_part, new_part = old_index[start:stop], new_index[start:stop]
    coming = found_in(old_index, new_part, one.ranges)
    first = sum(coming.holders[:rank])
    own = coming.others[first : first + coming.holders[rank]] - start
    stayed = _taken(one.state, own)
    if holders(one.ranges) == 1:
        return _Move(coming, stayed, stayed[:, :0].T, [0] * len(one.ranges))
    candidates = outside(old_part, new_part)
    leaving = found_in(new_index, old_part.index_select(0, candidates), one.ranges)
    rows = _taken(one.state, candidates.index_select(0, leaving.places)).T
    return _Move(coming, stayed, rows, leaving.holders)


def _taken(state: PrincipalState, places: Tensor) -> Tensor:
    """Return some entries of a state, float32 [3, s], on the device of `places`."""
    taken = torch.empty(len(state), places.numel(), device=places.device)
    there = places.to(state.master.device)
    for row, tensor in zip(taken, state, strict=True):
        row.copy_(tensor.index_select(0, there))
    return taken


def _exchanged(moves: Collection[_Move], rank: int, group: Any) -> list[Tensor]:
    """Return for each matrix what comes from other ranks, [3, s], in their order; one all-to-all for all matrices."""
    ranks = range(comm.get_world_size(group=group))
    leaving = [move.rows.split(move.leaving) for move in moves]
    coming = [[0 if other == rank else move.coming.holders[other] for other in ranks] for move in moves]
    rows = torch.cat([of_matrix[other] for other in ranks for of_matrix in leaving])
    arrived = rows.new_empty(sum(map(sum, coming)), 3)
    comm.all_to_all_single(
        arrived.view(-1),
        rows.view(-1),
        output_split_sizes=[3 * sum(of_matrix[other] for of_matrix in coming) for other in ranks],
        input_split_sizes=[3 * sum(move.leaving[other] for move in moves) for other in ranks],
        group=group,
    )
    # By rank, and of each rank by matrix.
    parts = arrived.split([of_matrix[other] for other in ranks for of_matrix in coming])
    return [torch.cat(parts[number :: len(moves)]).T for number in range(len(moves))]
