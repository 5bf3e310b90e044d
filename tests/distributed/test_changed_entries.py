"""Pins what training has changed, on two ranks in bf16, ZeRO-2 with a Llama and ZeRO-3 with stacks of experts: a copy
that is kept by patches equals the trained model to the bit; the weights before training come back to the bit, also
between forward and backward, and training does not notice; both after a resume, which is compared with a run that never
looked; the bytes that cross the network; what the records take.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import run_ranks

Results = dict[str, Any]

#: Steps after which the patches are applied on every rank: 7 times, two of them right after a refresh.
COMPARED = 7


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    return run_ranks("changes", 2, tmp_path_factory.mktemp("changes"))


@pytest.fixture(params=["stage 2", "stage 3"])
def runs(request: pytest.FixtureRequest, ranks: list[Results]) -> list[Results]:
    return [rank[request.param] for rank in ranks]


def test_a_copy_kept_by_patches_is_the_trained_model(runs: list[Results]) -> None:
    for run in runs:
        assert run["refreshes"] == [6, 12, 18]
        assert run["equal"] == [True] * COMPARED
        assert run["nothing"] == [[]] * 20, "nothing has changed since the last step"


def test_rank_0_alone_can_have_them(runs: list[Results]) -> None:
    assert runs[0]["main"] == [True] * 20
    assert runs[1]["sizes"] == [0] * 20


def test_a_patch_is_the_selection_and_what_has_left_it(runs: list[Results]) -> None:
    """2 bytes for a value and 4 for an index, and a norm of 32 in full; more only after a refresh."""
    usual = 6 * runs[0]["entries"] + 2 * 32
    sizes = runs[0]["sizes"]
    assert all(size == usual for step, size in enumerate(sizes, 1) if step % 6)
    assert all(usual < size < 1.6 * usual for step, size in enumerate(sizes, 1) if step % 6 == 0)


@pytest.mark.parametrize(("stage", "of_an_entry"), [("stage 2", 2), ("stage 3", 4)])
def test_the_index_and_in_zero_3_the_values_cross_the_network(
    stage: str, of_an_entry: int, ranks: list[Results]
) -> None:
    """Of two ranks each receives a half; the index has 2 bytes for each row besides, rounded up to whole words."""
    run = ranks[0][stage]
    least = of_an_entry * run["entries"] / 2
    assert least <= run["received 11"] <= 1.4 * least
    after_a_refresh = run["received 12"] - run["received 11"]
    assert after_a_refresh == 0 if stage == "stage 2" else after_a_refresh > 0


def test_the_weights_before_training_come_back(runs: list[Results]) -> None:
    for run in runs:
        assert run["base"] == [True] * 7
        assert run["collectives"] == {}


def test_a_run_that_is_resumed_and_never_looked_ends_alike(runs: list[Results]) -> None:
    for run in runs:
        assert run["resumed"] == {"base at once": True, "ended": True, "base": True, "records": True}


def test_records_take_4_bytes_an_entry(runs: list[Results]) -> None:
    """And 2 for each row, rounded up to whole words."""
    for run in runs:
        found = run["records"]
        assert 0 <= found["bytes"] - found["least"] <= 2 * len(found)


def test_ranks_of_zero_3_record_what_they_hold(ranks: list[Results]) -> None:
    first, second = (rank["stage 3"]["records"] for rank in ranks)
    for key in first.keys() - {"bytes", "least"}:
        mine, others = first[key][0], second[key][0]
        assert not mine.numel() or not others.numel() or mine[-1] < others[0]
    whole = [rank["stage 2"]["records"] for rank in ranks]
    assert all(all(map(torch.equal, whole[0][key], whole[1][key])) for key in whole[0].keys() - {"bytes", "least"})


def test_another_stage_takes_the_record_of_a_universal_checkpoint(ranks: list[Results]) -> None:
    for rank in ranks:
        assert rank["other stage"]["base"]
        assert (
            "RuntimeError: within lift_ds.base_weights the weights are those before" in rank["other stage"]["refused"]
        )
