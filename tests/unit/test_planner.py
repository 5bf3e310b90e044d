"""Pins the planner: sizes of the named models as published, a plan that follows from the formulas, the files of
`ds_configs/sizes` as the planner writes them, and one clear error for everything that cannot be planned.

That the formulas are true is checked against counts by benchmarks/footprint.py and tests/distributed/test_footprint.py.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from deepspeed.runtime.zero.leaf_module_config import DEFAULT_LEAF_MODULE_CLASSES

from lift_ds import LiftConfig, cli
from lift_ds.config import USUAL_DENSITY
from lift_ds.planner import ds_file, estimate, peak
from lift_ds.planner.architecture import LEAVES
from lift_ds.planner.estimate import Choice, Cluster
from lift_ds.planner.formulas import persistent
from lift_ds.planner.hardware import DEVICES, device_for
from lift_ds.planner.models import ModelFacts, read_facts
from lift_ds.planner.plan import Plan, Request, make_plan
from lift_ds.planner.presets import PRESETS
from lift_ds.planner.presets import main as presets_main

SIZES = Path(__file__).parents[2] / "ds_configs" / "sizes"
CONFIG = LiftConfig(budget_rank=128)

#: Parameters of each model as transformers counts them in the published checkpoints.
PUBLISHED = {
    "1B": 1_235_814_400, "3B": 3_212_749_824, "7B": 6_738_415_616, "8B": 8_030_261_248,
    "13B": 13_015_864_320, "32B": 32_763_876_352, "70B": 68_976_648_192,
    "MIXTRAL-8X7B": 46_702_792_704, "QWEN3-30B-A3B": 30_532_122_624, "GPT-OSS-20B": 20_914_757_184,
}  # fmt: skip
#: Mixtures of experts: the billions of parameters that a token passes, by their cards. GPT-OSS's says 3.6, without the
#: 0.58 of the embeddings.
MIXTURES = {"MIXTRAL-8X7B": 12.9, "QWEN3-30B-A3B": 3.3, "GPT-OSS-20B": 3.6 + 0.58}

SMALL = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
}  # fmt: skip


@pytest.fixture(scope="module")
def facts() -> ModelFacts:
    return read_facts("7B", CONFIG)


def planned(facts: ModelFacts, nodes: int = 1, memory: float = 80, **changes: object) -> Plan:
    request = dataclasses.replace(Request(batch=16, sequence=2048), **changes)  # type: ignore[arg-type]
    return make_plan(facts, CONFIG, Cluster(nodes, 8, device_for(memory)), request)


@pytest.mark.parametrize("size", PRESETS)
def test_a_named_size_has_the_parameters_of_its_model(size: str) -> None:
    found = read_facts(size, CONFIG)
    assert found.parameters == PUBLISHED[size]
    assert len(found.shapes) == (6 if size in MIXTURES else 7) * found.layers
    counts = {name: 128 * (m + n) for name, (m, n) in found.shapes.items()}
    assert found.entries == {name: found.matrices[name] * k for name, k in counts.items()}


@pytest.mark.parametrize("size", MIXTURES)
def test_a_token_passes_some_of_the_experts(size: str) -> None:
    found = read_facts(size, CONFIG)
    assert (found.parameters - found.uses.idle) / 1e9 == pytest.approx(MIXTURES[size], abs=0.06)


def test_the_planner_knows_the_leaf_modules_of_deepspeed() -> None:
    """It imports no DeepSpeed; a version with others would send other bytes."""
    assert {name.rsplit(".", 1)[1] for name in DEFAULT_LEAF_MODULE_CLASSES} == set(LEAVES)


@pytest.mark.parametrize("memory", [80, 141])
@pytest.mark.parametrize("size", PRESETS)
def test_the_file_of_a_size_is_what_the_planner_recommends(size: str, memory: int, tmp_path: Path) -> None:
    command = ["plan", "--model", size, "--gpu-memory", str(memory), "--write", str(tmp_path / "file.json")]
    assert cli.main(command) == 0
    name = f"{size.lower()}_8x{memory}gb.json"
    assert (SIZES / name).read_text() == (tmp_path / "file.json").read_text(), f"lift-ds {' '.join(command)}"
    assert LiftConfig.from_ds_config(SIZES / name) == LiftConfig(density=USUAL_DENSITY)


def test_a_plan_has_a_row_for_each_method_and_stage_and_recommends_one_that_fits(facts: ModelFacts) -> None:
    plan = planned(facts)
    named = [(row.choice.method, row.choice.stage) for row in plan.rows]
    assert named == [(method, stage) for method in ("full", "lora", "lift") for stage in range(4)]
    assert plan.recommended is not None
    assert plan.recommended.fits
    assert plan.recommended.choice.method == "lift"


def test_what_does_not_fit_says_by_how_much(facts: ModelFacts) -> None:
    plan = planned(facts, memory=12)
    assert plan.recommended is None or plan.recommended.peak <= plan.cluster.hardware.usable_bytes
    tight = [row for row in plan.rows if not row.fits]
    assert tight
    for row in tight:
        over = max(0.0, row.peak - row.limit) + max(0.0, row.host - row.host_limit)
        assert row.missing == pytest.approx(over)
        assert row.missing > 0


def test_the_optimizer_goes_to_the_host_only_where_it_must(facts: ModelFacts) -> None:
    assert not any(row.choice.offload for row in planned(facts).rows if row.fits)
    full = planned(read_facts("32B", CONFIG), methods=("full",), stages=(2,)).rows[0]
    assert full.choice.offload
    assert full.host == 16 * PUBLISHED["32B"] / 8
    without = planned(read_facts("32B", CONFIG), methods=("full",), stages=(2,), offload=False).rows[0]
    assert not without.fits


def test_a_batch_is_cut_into_micro_batches_of_equal_size(facts: ModelFacts) -> None:
    for row in planned(facts, batch=64).rows:
        assert row.choice.micro_batch * row.choice.accumulation == 8
    assert planned(facts, nodes=4).batch == 32  # one sequence a rank at least
    assert planned(facts, batch=64, micro_batch=4).rows[0].choice.accumulation == 2


def test_checkpointing_trades_memory_for_time(facts: ModelFacts) -> None:
    plain, again = (planned(facts, checkpointing=on, stages=(2,), methods=("lift",)).rows[0] for on in (False, True))
    assert again.peak < plain.peak
    assert again.time.compute > plain.time.compute


def test_the_peak_is_what_is_held_and_the_worst_moment(facts: ModelFacts) -> None:
    choice = Choice("lift", 2, False, 1, 1, True, 2048)
    cluster = Cluster(1, 8, DEVICES["h100"])
    found = estimate.estimate(facts, CONFIG, choice, cluster)
    setting = estimate.setting_for(facts, CONFIG, choice, 8)
    work = estimate.activations_for(facts, choice)
    assert found.persistent == persistent(setting)
    without_refresh = {name: size for name, size in found.moments.items() if name != estimate.REFRESH}
    assert max(without_refresh.values()) == peak.peak(setting, work)[1]
    # 32 layers keep their inputs, 2 bytes x 2048 tokens x 4096.
    assert peak.saved_by_model(work) == 32 * 2 * 2048 * 4096


def test_network_of_lift_is_a_tenth_of_full_fine_tuning_in_zero2(facts: ModelFacts) -> None:
    full, lift = (planned(facts, methods=(method,), stages=(2,)).rows[0].received for method in ("full", "lift"))
    # The budget of the design for a density of 5%: a twelfth; full fine-tuning here trains embeddings and head too.
    assert lift < full / 12


def test_slower_links_take_longer_and_more_ranks_refresh_faster(facts: ModelFacts) -> None:
    fast = planned(facts, nodes=2, methods=("lift",), stages=(3,))
    slow_links = dataclasses.replace(DEVICES["h100"], inter_gb=1.0)
    slow = make_plan(facts, CONFIG, Cluster(2, 8, slow_links), Request(16, 2048, methods=("lift",), stages=(3,)))
    assert slow.rows[0].time.network > fast.rows[0].time.network
    one = planned(facts, methods=("lift",), stages=(2,))
    assert max(fast.rows[0].refresh.operations) < max(one.rows[0].refresh.operations)  # type: ignore[union-attr]


def test_files_and_table_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    outputs = {"--json": tmp_path / "plan.json", "--plot": tmp_path / "plan.svg", "--write": tmp_path / "ds.json"}
    arguments = ["plan", "--model", str(tmp_path), "--nodes", "2", "--gpus-per-node", "4", "--density", "0.05"]
    arguments += ["--stages", "2", "3"]
    for option, path in outputs.items():
        arguments += [option, str(path)]
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert "recommended: lift" in said
    assert "14 matrices" in said
    found = json.loads(outputs["--json"].read_text())
    chosen = found["choices"][found["recommended"]]
    assert chosen["fits"]
    assert len(chosen["refresh"]["matrices_by_rank"]) == 8
    assert sum(chosen["refresh"]["matrices_by_rank"]) == 14
    written = json.loads(outputs["--write"].read_text())
    assert written["zero_optimization"]["stage"] == chosen["stage"]
    assert written["lift"]["density"] == 0.05
    assert outputs["--plot"].read_text().count("<svg") == 1


def test_a_file_says_what_the_plan_counts_on(facts: ModelFacts) -> None:
    plan = planned(facts)
    choice = Choice("full", 3, True, 2, 4, True, 1024)
    content = ds_file.ds_file(plan, choice)
    assert content["train_micro_batch_size_per_gpu"] == 2
    assert content["gradient_accumulation_steps"] == 4
    assert content["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert content["train_defaults"] == {"gradient_checkpointing": True, "max_length": 1024}
    assert "lift" not in content


def _config(folder: Path, **changes: object) -> str:
    content = {name: value for name, value in {**SMALL, **changes}.items() if value is not None}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content))
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "has no hidden_size"),
        ({"vocab_size": None, "num_hidden_layers": None}, "has no num_hidden_layers, vocab_size"),
        ({"model_type": None}, "model_type=None is no model"),
        ({"model_type": "lama"}, "model_type='lama' is no model"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers is no whole number"),
    ],
)
def test_a_configuration_without_what_is_needed(
    changes: dict[str, object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "--model", _config(tmp_path / "model", **changes)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "9B"], "'9B' is neither a size (1B, 3B"),
        (["--model", "7B", "--nodes", "100"], "800 ranks, more than the 224 matrices"),
        (["--model", "7B", "--micro-batch", "3"], "--micro-batch 3"),
        (["--model", "7B", "--density", "0.05", "--budget-rank", "8"], "give one"),
        (["--model", "7B", "--density", "1.5"], "density=1.5"),
        (["--model", "7B", "--reserve", "90"], "--reserve 90 leaves nothing"),
        (["--model", "7B", "--efficiency", "1.2"], "--efficiency 1.2"),
        (["--model", "7B", "--deepspeed", "no.json"], "no.json"),
        (["--model", "7B", "--json", "/no/folder/plan.json"], "--json /no/folder/plan.json: cannot be written"),
        (["--model", "70B", "--gpu-memory", "8", "--write", "x.json"], "nothing fits"),
    ],
)
def test_what_cannot_be_planned_is_one_clear_error(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said


def test_the_hub_name_of_a_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert presets_main(["7b"]) == 0
    assert capsys.readouterr().out == "meta-llama/Llama-2-7b-hf\n"
    assert presets_main(["9B"]) == 2
    assert "size 9B is not one of 1B, 3B" in capsys.readouterr().err
