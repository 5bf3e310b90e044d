"""Pins down what a refresh does to the states of training: `carry_over` is that of a dictionary, and ranks that hold
ranges come to the same by what they send to each other; exactly, since nothing is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from helpers import random_matrix
from torch import Tensor

from lift_ds.refresh.carry import PrincipalState, Range, carry_over, found_in, outside, state_of


def _selection(k: int, seed: int, size: int = 60) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:k].sort().values.int()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (_selection(20, 1), _selection(20, 2)),
        (_selection(20, 1), _selection(20, 1)),
        (torch.arange(0, 20).int(), torch.arange(20, 40).int()),
        (torch.arange(20, 40).int(), torch.arange(0, 20).int()),
        (torch.arange(0, 20).int(), torch.arange(1, 21).int()),
        (torch.tensor([59]).int(), torch.tensor([0]).int()),
    ],
    ids=["mixed", "the same", "all above", "all below", "shifted", "one"],
)
def test_carry_over_is_that_of_a_dictionary(old: Tensor, new: Tensor, dtype: torch.dtype) -> None:
    k = old.numel()
    state = PrincipalState(*(random_matrix(1, k, seed).flatten() for seed in (3, 4, 5)))
    weight = random_matrix(6, 10, 6).to(dtype)
    by_position = {position: tuple(t[i].item() for t in state) for i, position in enumerate(old.tolist())}
    expected = [by_position.get(p, (weight[p // 10, p % 10].item(), 0.0, 0.0)) for p in new.tolist()]

    carried, replaced = carry_over(old, state, new, weight.view(-1)[new.long()])

    assert list(zip(*(t.tolist() for t in carried), strict=True)) == expected
    assert replaced == len(set(new.tolist()) - set(old.tolist()))
    assert all(t.dtype == torch.float32 for t in carried)


def test_carry_over_prefers_the_master_over_the_rounded_weight() -> None:
    """A survivor's float32 master differs from its bf16 weight; taking the weight would round it at every refresh."""
    current = torch.ones(2, dtype=torch.bfloat16)
    master = torch.tensor([1.001, 0.999])
    state = PrincipalState(master, torch.ones(2), torch.ones(2))
    carried, _ = carry_over(torch.tensor([1, 4]).int(), state, torch.tensor([2, 4]).int(), current)
    assert carried.master.tolist() == [1.0, master[1].item()]


def ranges_of(k: int, ranks: int, seed: int) -> list[Range]:
    """Ranges of random lengths, some of them empty."""
    cuts = torch.randint(0, k + 1, (ranks - 1,), generator=torch.Generator().manual_seed(seed)).sort().values.tolist()
    return list(pairwise([0, *cuts, k]))


def carried_by_ranks(
    old: Tensor, state: PrincipalState, new: Tensor, current: Tensor, ranges: Sequence[Range]
) -> tuple[PrincipalState, int]:
    """What the ranks have afterwards, one after the other: each is given what the others send to it."""
    table = torch.stack(state)
    parcels = []  # of each rank: for each rank the rows that go there
    for start, stop in ranges:
        places = outside(old[start:stop], new[start:stop])
        leaving = found_in(new, old[start:stop][places], ranges)
        parcels.append((table[:, start:stop][:, places[leaving.places]]).split(leaving.holders, dim=1))
    states, replaced = [], 0
    for rank, (start, stop) in enumerate(ranges):
        coming = found_in(old, new[start:stop], ranges)
        first = sum(coming.holders[:rank])
        own = table[:, coming.others[first : first + coming.holders[rank]]]
        sent = [own if other == rank else parcels[other][rank] for other in range(len(ranges))]
        assert [part.shape[1] for part in sent] == coming.holders  # both sides know how many come
        assert parcels[rank][rank].numel() == 0  # what stays is not sent
        states.append(torch.stack(state_of(current[start:stop], torch.cat(sent, dim=1), coming.places)))
        replaced += stop - start - coming.places.numel()
    return PrincipalState(*torch.cat(states, dim=1)), replaced


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("seed", range(6))
def test_ranks_with_a_range_each_carry_the_same_over(ranks: int, seed: int) -> None:
    k, size = 150, (160, 400, 4000)[seed % 3]  # nearly everything stays; half; hardly anything
    old, new = _selection(k, seed, size), _selection(k, seed + 50, size)
    state = PrincipalState(*(random_matrix(1, k, seed + i).flatten() for i in range(3)))
    current = random_matrix(1, k, seed + 9).flatten().bfloat16()

    expected, replaced = carry_over(old, state, new, current)
    carried, counted = carried_by_ranks(old, state, new, current, ranges_of(k, ranks, seed))

    assert all(torch.equal(*pair) for pair in zip(carried, expected, strict=True))
    assert counted == replaced


def test_what_leaves_a_rank_lies_before_or_behind_its_new_range() -> None:
    old, new = torch.tensor([2, 5, 7, 8, 9, 12]), torch.tensor([1, 2, 5, 7, 8, 12])
    assert outside(old[:3], new[:3]).tolist() == [2]  # 7 is behind 1 2 5
    assert outside(old[3:], new[3:]).tolist() == []
    assert outside(new[:3], old[:3]).tolist() == [0]  # the way back: 1 is before 2 5 7
    assert outside(old[:0], new[:0]).tolist() == []
