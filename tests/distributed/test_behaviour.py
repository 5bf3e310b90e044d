"""Pins down the invariants on two ranks and every ZeRO stage: what a step may change and what is counted, loading a
partitioned model, memory in ZeRO-2, resuming, and that a run in which LIFT is not active stops.

The refresh interval is 3 and runs take 7 steps. Comparisons are exact: nothing is computed in two ways.
"""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch
from harness import run_ranks

Results = dict[str, Any]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    return run_ranks("behaviour", 2, tmp_path_factory.mktemp("behaviour"))


@pytest.fixture(params=[f"changes {dtype}stage {stage}" for dtype in ("", "bf16 ") for stage in range(4)])
def changes(request: pytest.FixtureRequest, ranks: list[Results]) -> list[Results]:
    return [rank[request.param] for rank in ranks]


def test_a_step_changes_nothing_outside_the_principal_set(changes: list[Results]) -> None:
    for rank in changes:
        assert rank["trained"] > 0
        assert rank["outside"] == 0
        assert rank["frozen"] == 0


def test_weights_hold_the_trained_values_after_each_step(changes: list[Results]) -> None:
    assert [rank["unwritten"] for rank in changes] == [0, 0]


def test_extra_parameters_are_trained_beside(changes: list[Results]) -> None:
    assert all(rank["dense_moved"] for rank in changes)


def test_refreshes_come_every_third_step_and_replace_something(changes: list[Results]) -> None:
    for rank in changes:
        assert [(step, matrices) for step, matrices, _ in rank["refreshes"]] == [(3, 14), (6, 14)]
        assert all(0 < churn < 1 for *_, churn in rank["refreshes"])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_each_matrix_is_selected_by_one_rank(ranks: list[Results], stage: int) -> None:
    owned = [rank[f"changes stage {stage}"]["owned"] for rank in ranks]
    assert len(owned[0]) == len(owned[1]) == 7  # alike layers, so an even split
    assert not set(owned[0]) & set(owned[1])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_skipped_step_moves_nothing_and_is_not_counted(ranks: list[Results], stage: int) -> None:
    for rank in ranks:
        run = rank[f"skipped stage {stage}"]
        assert run["moved"] == [True, False, True, False, True, True]
        assert run["counts"] == [1, 1, 2, 2, 3, 4]
        assert run["refreshes"] == [3]


@pytest.mark.parametrize("stage", range(4))
def test_micro_batches_are_not_counted(ranks: list[Results], stage: int) -> None:
    assert ranks[0][f"accumulation stage {stage}"] == {"count": 4, "refreshes": [3]}


def test_attach_to_a_partitioned_model_selects_the_same(ranks: list[Results]) -> None:
    for rank in ranks:
        run = rank["partitioned loading"]
        assert run["found"].keys() == run["expected"].keys()
        assert all(torch.equal(run["found"][name], run["expected"][name]) for name in run["expected"])
        assert run["losses"] == run["expected_losses"]


def test_zero3_shards_the_index(ranks: list[Results]) -> None:
    run = ranks[0]["partitioned loading"]
    assert 0 <= run["held"] - run["words"] / 2 <= 14  # at most one word of padding a matrix


def test_zero2_keeps_no_dense_gradient_and_no_dense_state(ranks: list[Results]) -> None:
    for rank in ranks:
        run = rank["memory"]
        assert run["dense_gradients"] == 0
        # θ, its gradient, master and moments of all layers are flat buffers: the largest things that may be alive
        # besides the gradient of one layer.
        flat = run["entries"] + 1024
        assert flat < run["weights"][0] * 2 < sum(run["weights"]) / 10, "the case cannot tell sparse from dense"
        for moment in ("after_backward", "after_step"):
            assert run[moment], "the walk found no tensor"
            large = [size for size in run[moment] if size > flat]
            assert len(large) <= 1, f"alive {moment}: {large}"
            assert sum(run[moment]) < sum(run["weights"]) / 2


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", [1, 2])
def test_the_index_is_gathered_once_a_backward_and_a_layer_ahead(
    ranks: list[Results], stage: int, accumulation: int
) -> None:
    """The first step learns the order; the refresh after the third reads the old index while it is still whole."""
    for rank in ranks:
        run = rank[f"index sharded stage {stage} accumulation {accumulation}"]
        once = run["layers"] * accumulation
        assert [step["gathers"] for step in run["steps"]] == [once] * 4
        assert [step["uses"] for step in run["steps"]] == [once] * 4
        assert [step["ahead"] for step in run["steps"]] == [0, once - 1, once - 1, once - 1]


def test_between_steps_each_rank_holds_its_part_of_the_index(ranks: list[Results]) -> None:
    for rank in ranks:
        run = rank["index sharded stage 2 accumulation 1"]
        assert run["whole"] == 0
        assert 0 <= run["shards"] - run["words"] / 2 <= run["layers"]  # at most a word of padding each


def test_a_replicated_index_needs_no_traffic(ranks: list[Results]) -> None:
    for rank in ranks:
        run = rank["index replicated"]
        assert [step["gathers"] for step in run["steps"]] == [0] * 4
        assert run["whole"] == run["words"] > 0


SAVED = [(0, False, "save_pretrained"), (0, True, "save_pretrained"), (2, True, "save_pretrained")]
SAVED += [(0, False, "16bit"), (2, True, "16bit"), (3, True, "16bit"), (2, True, "converted"), (3, True, "converted")]


@pytest.mark.parametrize(("stage", "bf16", "way"), SAVED)
def test_a_model_saved_in_training_is_a_plain_one(ranks: list[Results], stage: int, bf16: bool, way: str) -> None:
    """With the trained weights; out of a checkpoint with the float32 values they were rounded from."""
    for rank in ranks:
        run = rank[f"saved stage {stage} bf16 {bf16}"]
        assert set(run[way]) == set(cases.build("llama").state_dict())
        expected = run["masters" if way == "converted" else "weights"]
        for name, weight in run[way].items():
            assert torch.equal(weight, expected[name]), name
        assert "ValueError: exclude_frozen_parameters=True" in run["refused"]


def test_the_script_beside_a_checkpoint_writes_the_plain_model_in_float32(ranks: list[Results]) -> None:
    found, expected = ranks[0]["converted by script"], ranks[0]["saved stage 3 bf16 True"]["masters"]
    assert set(found) == set(cases.build("llama").state_dict())
    assert {weight.dtype for weight in found.values()} == {torch.float32}
    assert all(torch.equal(weight, expected[name].float()) for name, weight in found.items())


RESUMES = [f"resume stage {stage} after 4" for stage in range(4)]
RESUMES += ["resume stage 2 after 2", "resume stage 3 after 3", "resume bf16 stage 1"]
RESUMES += ["resume offload stage 2", "resume offload stage 3", "resume in place stage 1", "resume in place stage 3"]


@pytest.mark.parametrize("name", RESUMES)
def test_resume_continues_to_the_bit(ranks: list[Results], name: str) -> None:
    for rank in ranks:
        expected, found = rank[name]["expected"], rank[name]["found"]
        assert found["losses"] == expected["losses"]
        for kind in ("weights", "indices"):
            assert all(torch.equal(found[kind][key], expected[kind][key]) for key in expected[kind])


def test_shipped_files_work_as_they_are(ranks: list[Results]) -> None:
    """By `lift_ds.initialize`; one model, one batch, so that stages and offloading show the same losses (fp32)."""
    runs = ranks[0]["shipped files"]
    stages = {name: (run["stage"], run["cpu_kernel"]) for name, run in runs.items()}
    assert stages == {
        "lift_zero1": (1, False),
        "lift_zero2": (2, False),
        "lift_zero3": (3, False),
        "lift_zero2_offload": (2, True),
        "lift_zero3_offload": (3, True),
    }
    for run in runs.values():
        assert run["density"] == 0.05
        assert run["losses"] == pytest.approx(runs["lift_zero2"]["losses"], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("unbound", ["RuntimeError", "not active", "lift_ds.initialize"]),
        ("foreign_optimizer", ["ValueError", "does not train the principal values of 14 matrices"]),
        ("two_copies", ["ValueError", "frozen_weights='2' and zero_hpz_partition_size=2", "leave the latter out"]),
        ("other_model", ["ValueError", "lift.json", "another model", "mlp.", "[80, 32]", "[96, 32]"]),
        ("nothing_saved", ["ValueError", "latest is missing"]),
        ("not_finite", ["ValueError", "model.layers.", ".weight", "NaN"]),
    ],
)
def test_refused_with_a_clear_message(ranks: list[Results], name: str, parts: list[str]) -> None:
    for rank in ranks:
        for part in parts:
            assert part in rank["refusals"][name]
