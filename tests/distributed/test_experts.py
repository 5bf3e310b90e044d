"""Pins down the invariants for mixtures of experts on two ranks: a step changes the selected entries of each expert and
no others, resumes continue to the bit, on other numbers of ranks too, and no more than one stack's gradient is alive.

`test_parity_experts.py` compares with the reference. Comparisons are exact, but for a run on changing numbers of ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from harness import run_ranks
from test_checkpoints import check_continued

Results = dict[str, Any]


@pytest.fixture(scope="module", params=["few", pytest.param("every", marks=pytest.mark.slow)])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    return run_ranks("experts", 2, tmp_path_factory.mktemp("experts"), request.param)


def of_kind(rank: Results, kind: str) -> dict[str, Results]:
    found = {name: result for name, result in rank.items() if name.startswith(kind)}
    assert found
    return found


def test_a_step_changes_the_principal_values_and_nothing_else(ranks: list[Results]) -> None:
    for rank in ranks:
        for name, run in of_kind(rank, "changes").items():
            assert run["trained"] > 0, name
            assert (run["outside"], run["unwritten"], run["frozen"]) == (0, 0, 0), name
            # 8 matrices of attention and 16 of experts, each selected in by itself.
            assert [(step, matrices) for step, matrices, _ in run["refreshes"]] == [(3, 24), (6, 24)], name
            assert all(0 < churn < 1 for *_, churn in run["refreshes"]), name


def test_resumes_continue_to_the_bit(ranks: list[Results]) -> None:
    """With the optimizer on the host, and with refreshes in parts, too."""
    for rank in ranks:
        for name, run in of_kind(rank, "resume").items():
            assert run["found"]["losses"] == run["expected"]["losses"], name
            for what in ("weights", "indices"):
                found, expected = run["found"][what], run["expected"][what]
                assert all(torch.equal(found[key], expected[key]) for key in expected), name


def test_one_dense_gradient_of_a_stack_is_alive_at_a_time(ranks: list[Results]) -> None:
    """None where the model takes one matrix after the other out of a stack. With `batched_mm` the model's own forward
    copies matrices for each token, which are as large; then nothing can be told before the backward is over.
    """
    for rank in ranks:
        for name, run in of_kind(rank, "alive").items():
            way = cases.EXPERTS[name.split()[1]]
            if way != "batched_mm":
                assert run["during"] == [int(way != "eager")] * run["stacks"], name
            assert run["after"] == [0, 0], name
            assert run["dense_gradients"] == 0, name


@pytest.mark.slow  # three launches
def test_two_ranks_then_one_then_two(tmp_path: Path) -> None:
    """In ZeRO-3. Cut right after the refresh of step 3, and behind that of step 6."""
    first = run_ranks("experts", 2, tmp_path, "whole", "0,3,,two")[0]
    one = run_ranks("experts", 1, tmp_path, "3,7,two_universal,one")[0]
    last = run_ranks("experts", 2, tmp_path, "7,8,one_universal,")[0]
    check_continued(first["whole"], [result["piece"] for result in (first, one, last)])
