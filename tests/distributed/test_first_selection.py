"""Pins down the first selection on 2 and 4 ranks: dealt out, each rank in at most its share and one matrix more; the
same indices (and subspaces) as those of one process, to the last one; and none at all where a checkpoint brings them.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from harness import run_ranks

MATRICES = 14
STARTS = ("attach", *(f"initialize {stage}" for stage in range(4)), "zero.Init")


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks("first_selection", request.param, tmp_path_factory.mktemp("first"))


@pytest.fixture
def two_ranks(ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if len(ranks) != 2:
        pytest.skip("resumed on two ranks")
    return ranks


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("start", STARTS)
def test_every_rank_has_the_indices_of_one_process(ranks: list[dict[str, Any]], start: str) -> None:
    for rank in ranks:
        solver = "chebyshev" if start == "attach" else "svd"
        expected = rank[start].get("expected", rank["one process"][solver]["indices"])
        assert len(expected) == MATRICES
        assert same(rank[start]["indices"], expected)


@pytest.mark.parametrize("start", STARTS)
def test_each_matrix_is_selected_in_once_and_evenly(ranks: list[dict[str, Any]], start: str) -> None:
    selected = [rank[start]["selected"] for rank in ranks]
    assert sorted(name for names in selected for name in names) == sorted(ranks[0]["one process"]["svd"]["indices"])
    assert max(map(len, selected)) <= math.ceil(MATRICES / len(ranks)) + 1


def test_every_rank_has_the_subspaces_and_values_of_one_process(ranks: list[dict[str, Any]]) -> None:
    """Which ranks will refresh what is not known yet; warm or cold, "chebyshev" may differ within its tolerance."""
    for rank in ranks:
        assert len(rank["one process"]["chebyshev"]["subspaces"]) == MATRICES
        assert same(rank["attach"]["subspaces"], rank["one process"]["chebyshev"]["subspaces"])
        assert rank["attach"]["values"]


def test_a_weight_that_cannot_be_ranked_stops_all_ranks(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "model.layers.1.mlp.up_proj.weight" in rank["broken"]["message"]
        assert "NaN or infinite" in rank["broken"]["message"]
        assert not rank["broken"]["attached"]


@pytest.mark.parametrize("stage", range(4))
def test_a_resume_selects_nothing_and_goes_on_to_the_bit(two_ranks: list[dict[str, Any]], stage: int) -> None:
    for rank in two_ranks:
        found = rank[f"resume {stage}"]
        assert found["selected"] == []
        assert found["losses"] == found["expected_losses"]
        assert same(found["indices"], found["expected"])


@pytest.mark.parametrize("stage", range(4))
def test_nothing_is_trained_or_saved_before_the_checkpoint_is_loaded(
    two_ranks: list[dict[str, Any]], stage: int
) -> None:
    for rank in two_ranks:
        for attempt in ("trained_too_early", "saved_too_early"):
            assert rank[f"resume {stage}"][attempt].startswith("RuntimeError: nothing is selected: resume=True")


def test_so_it_is_in_a_trainer(two_ranks: list[dict[str, Any]]) -> None:
    start, resume = ([rank["trainer"][part] for rank in two_ranks] for part in ("start", "resume"))
    assert sum(len(rank["selected"]) for rank in start) == MATRICES
    assert max(len(rank["selected"]) for rank in start) <= MATRICES // 2 + 1
    for before, after in zip(start, resume, strict=True):
        assert after["selected"] == []
        assert after["losses"] == before["losses"]
        assert same(after["indices"], before["indices"])
