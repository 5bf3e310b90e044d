"""What a refresh does to the state of training: an entry that stays keeps it, a new one starts with zero moments.

`carry_over` says it for states that are whole. Where several ranks hold a range of the k entries each, an entry that
stays may come to lie in another rank's range, since as many others as came in before it did not drop out:

    old index    2 5 7 | 8 9 12        rank 0 holds the states left of the bar, rank 1 those right of it
    new index    1 2 5 | 7 8 12        7 goes from rank 0 to rank 1; 1 is new; nothing else crosses

By `found_in` a rank knows what comes to it: its new range, found in the old index. Positions ascend in both, so only
those of its old entries can leave it that lie before or behind the positions of its new range: `outside`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: Adam's two moments, as torch and DeepSpeed call them in the state of an optimizer.
EXP_AVG, EXP_AVG_SQ = MOMENTS = ("exp_avg", "exp_avg_sq")

#: The range of the k entries that a rank holds: first, and one past the last. Ranges ascend with the ranks.
Range = tuple[int, int]


class PrincipalState(NamedTuple):
    """The training state of the principal values of one matrix, or of a range of them, each float32 [k]."""

    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class Found(NamedTuple):
    """The entries of a range of one index that another index has too.

    Args:
        places: where they stand in the range, int64 [s], ascending.
        others: where they stand in the other index, int64 [s], ascending.
        holders: for each rank how many of them it holds in the other index; the first ones are those of rank 0.
    """

    places: Tensor
    others: Tensor
    holders: list[int]


@torch.no_grad()
def carry_over(
    old_index: Tensor, state: PrincipalState, new_index: Tensor, current: Tensor
) -> tuple[PrincipalState, int]:
    """Carry master values and moments from one selection to the next (Algorithm 1, refresh).

    An entry that stays selected keeps its master value and moments; a new one starts from its current
    weight and zero moments.

    Args:
        old_index: int [k], ascending, the selection `state` belongs to.
        state: tensors [k] in the order of `old_index`.
        new_index: int [k], ascending.
        current: [k], the current weights at `new_index`.

    Returns:
        The state in the order of `new_index`, and how many entries are new.
    """
    place, stays = _places_in(old_index, new_index)
    carried = PrincipalState(
        master=torch.where(stays, state.master[place], current.to(state.master.dtype)),
        exp_avg=torch.where(stays, state.exp_avg[place], 0.0),
        exp_avg_sq=torch.where(stays, state.exp_avg_sq[place], 0.0),
    )
    return carried, new_index.numel() - int(stays.sum())


@torch.no_grad()
def found_in(index: Tensor, part: Tensor, ranges: Sequence[Range]) -> Found:
    """Find the entries of a range of one index in another index. Two reads of the device.

    Args:
        index: int [k], ascending: the other index.
        part: int, ascending: the positions in a range of the one.
        ranges: of `index`, that of each rank.
    """
    place, found = _places_in(index, part)
    places = found.nonzero().squeeze(1)
    others = place.index_select(0, places)
    bounds = torch.tensor(ranges, device=part.device)  # [N, 2]
    before = torch.searchsorted(others, bounds)  # [N, 2]: how many stand before each bound
    return Found(places, others, (before[:, 1] - before[:, 0]).tolist())


@torch.no_grad()
def outside(old_part: Tensor, new_part: Tensor) -> Tensor:
    """Return the places in a range of the old index whose positions the same range of the new one has not between its
    first and its last, int64, ascending. One read of the device.

    Args:
        old_part: int [s], ascending.
        new_part: int [s], ascending.
    """
    if not old_part.numel():
        return old_part.long()
    before = torch.searchsorted(old_part, new_part[0])
    behind = torch.searchsorted(old_part, new_part[-1], right=True)
    first, last = torch.stack([before, behind]).tolist()
    places = torch.arange(old_part.numel(), device=old_part.device)
    return torch.cat([places[:first], places[last:]])


def within(ranges: Sequence[Range], start: int, stop: int) -> list[Range]:
    """Return what ranges have in [start, stop), counted from there; (0, 0) where a rank has nothing there."""
    clipped = [(max(first, start) - start, min(last, stop) - start) for first, last in ranges]
    return [(first, last) if first < last else (0, 0) for first, last in clipped]


def holders(ranges: Sequence[Range]) -> int:
    """Return how many ranks hold a part of a state."""
    return sum(start < stop for start, stop in ranges)


@torch.no_grad()
def state_of(current: Tensor, stayed: Tensor, places: Tensor) -> PrincipalState:
    """Return the state of a range: what stayed keeps its own, everything else is at the beginning of its training.

    Args:
        current: the weights at the entries of the range.
        stayed: float32 [3, s], in the order of the range: master, exp_avg and exp_avg_sq.
        places: int64 [s], where these stand in the range.
    """
    state = stayed.new_zeros(3, current.numel())
    state[0].copy_(current)
    return PrincipalState(*state.index_copy_(1, places, stayed))


def _places_in(index: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return where positions stand in an ascending index, int64, and whether they do."""
    place = torch.searchsorted(index, positions).clamp_(max=index.numel() - 1)
    return place, index.index_select(0, place) == positions
