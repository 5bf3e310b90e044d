"""Pins down that the work of a refresh is dealt out completely, evenly and alike on every rank."""

from __future__ import annotations

import pytest

from lift_ds.runtime.ranks import deal_out
from lift_ds.selection import selection_cost

LLAMA_7B_LAYER = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
def test_every_job_has_one_owner_and_no_rank_more_than_its_share_plus_one(ranks: int) -> None:
    costs = [selection_cost(*shape, 128, "gram") for shape in LLAMA_7B_LAYER * 5]
    jobs = deal_out(costs, ranks)
    assert len(jobs) == ranks
    assert sorted(job for owned in jobs for job in owned) == list(range(len(costs)))
    for owned in jobs:
        assert sum(costs[job] for job in owned) <= sum(costs) / ranks + max(costs)


def test_longest_jobs_come_first_and_ties_by_number() -> None:
    assert deal_out([1, 5, 5, 2], 2) == [[1, 3], [2, 0]]


def test_more_ranks_than_jobs_leaves_ranks_without_work() -> None:
    assert deal_out([3, 4], 4) == [[1], [0], [], []]


@pytest.mark.parametrize("solver", ["svd", "gram", "auto"])
def test_cost_does_not_depend_on_orientation_and_grows_with_the_matrix(solver: str) -> None:
    assert selection_cost(300, 100, 16, solver) == selection_cost(100, 300, 16, solver)
    assert selection_cost(300, 100, 16, solver) < selection_cost(300, 200, 16, solver)
    assert selection_cost(300, 100, 100, solver) < selection_cost(300, 100, 99, solver)  # W' = W: nothing to factor
