"""Master values and moments in a refresh: from the rank that holds an entry to the one that will hold it.

    rank 0 held    2 5 7      gets 1 2 5     keeps 2 and 5, sends 7 to rank 1; 1 starts from its weight
    rank 1 held    8 9 12     gets 7 8 12    keeps 8 and 12

Ranks hold ranges of the index, so few entries cross: about as many as came in before the end of a range more than had
dropped out there. No rank ever has the state of a whole matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed import comm
from torch import Tensor

from lift_ds.refresh.carry import PrincipalState, Range, found_in, holders, outside, state_of


@torch.no_grad()
def carry_between(
    old_index: Tensor, state: PrincipalState, new_index: Tensor, current: Tensor, ranges: Sequence[Range], group: Any
) -> tuple[PrincipalState, int]:
    """Carry the states of one matrix over from one selection to the next, of which each rank holds a range.

    All ranks of the group call. One all-to-all of 12 bytes for each entry that changes its rank; none where one rank
    holds everything.

    Args:
        old_index: int [k], ascending, whole.
        state: of this rank's range of it, on any device.
        new_index: int [k], ascending, whole.
        current: the weights at this rank's range of the new index.
        ranges: of each rank, in both indices.
        group: of these ranks.

    Returns:
        The state of this rank's range of the new index, on the device of the indices, and how many of its entries are
        new.
    """
    rank = comm.get_rank(group=group)
    start, stop = ranges[rank]
    old_part, new_part = old_index[start:stop], new_index[start:stop]
    coming = found_in(old_index, new_part, ranges)
    first = sum(coming.holders[:rank])
    own = coming.others[first : first + coming.holders[rank]] - start
    stayed = _taken(state, own, old_index.device)
    if holders(ranges) > 1:
        candidates = outside(old_part, new_part)
        leaving = found_in(new_index, old_part.index_select(0, candidates), ranges)
        rows = _taken(state, candidates.index_select(0, leaving.places), old_index.device).T.contiguous()
        counts = [0 if other == rank else count for other, count in enumerate(coming.holders)]
        arrived = _exchanged(rows, leaving.holders, counts, group).T
        stayed = torch.cat([arrived[:, :first], stayed, arrived[:, first:]], dim=1)
    return state_of(current, stayed, coming.places), stop - start - coming.places.numel()


def _taken(state: PrincipalState, places: Tensor, device: torch.device) -> Tensor:
    """Return some entries of a state, [3, s], on a device."""
    return torch.stack([tensor.index_select(0, places.to(tensor.device)) for tensor in state]).to(device)


def _exchanged(rows: Tensor, leaving: list[int], coming: list[int], group: Any) -> Tensor:
    """Return the rows that come to this rank, in the order of the ranks they come from; one all-to-all.

    Args:
        rows: [s, 3], in the order of the ranks they go to.
        leaving: for each rank how many go there.
        coming: for each rank how many come from there.
        group: of these ranks.
    """
    width = rows.shape[1]
    arrived = rows.new_empty(sum(coming), width)
    comm.all_to_all_single(
        arrived.view(-1),
        rows.view(-1),
        output_split_sizes=[width * count for count in coming],
        input_split_sizes=[width * count for count in leaving],
        group=group,
    )
    return arrived
