"""Settings and data that cannot be used end a run at once: one message that says where and why, no traceback.

Two cases under the launcher, where the other rank must keep silent and no process may stay; the rest in one
process, forked after the imports. All of them are refused before the first training step.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from launches import CONFIGS, Finished, finish, on_two_ranks
from material import Material

REFUSED = 2

#: Seconds to say no: imports, and where it takes the model to know, loading it.
BOUND_SECONDS = 120

Change = Callable[[dict[str, Any]], object]


def config_with(folder: Path, change: Change) -> Path:
    """Write lift_zero2.json with a change."""
    content = json.loads((CONFIGS / "lift_zero2.json").read_text())
    change(content)
    path = folder / "config.json"
    path.write_text(json.dumps(content))
    return path


def broken_lines(folder: Path, material: Material) -> Path:
    """Write data whose third line is cut off."""
    lines = material.instructions.read_text().splitlines()
    lines[2] = lines[2][:-5]
    path = folder / "broken.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_two_ranks_name_file_and_line_of_malformed_data_once(material: Material, tmp_path: Path) -> None:
    data = broken_lines(tmp_path, material)
    flags = material.flags(tmp_path / "out", "--train_file", data)
    command = on_two_ranks(CONFIGS / "lift_zero2.json", *flags)
    check_refusal(finish(command, tmp_path, limit=BOUND_SECONDS, fails=True), f"{data}, line 3, column")


def test_two_ranks_suggest_the_setting_that_was_meant_once(material: Material, tmp_path: Path) -> None:
    config = config_with(tmp_path, lambda content: content["lift"].update(refresh_intervall=7))
    command = on_two_ranks(config, *material.flags(tmp_path / "out"))
    ended = finish(command, tmp_path, limit=BOUND_SECONDS, fails=True)
    check_refusal(ended, "unknown setting 'refresh_intervall' in the \"lift\" block; did you mean 'refresh_interval'?")


def check_refusal(ended: Finished, message: str) -> None:
    """Check that the message came once, over both ranks, and nothing that looks like a crash."""
    assert ended.text.count("error: ") == 1, ended.text
    assert ended.text.count(message) == 1, ended.text
    assert "Traceback" not in ended.text
    assert not ended.output.exists()


@dataclass(frozen=True)
class Case:
    """Flags that replace or join those of a run that would work, and what is to be said."""

    message: str
    flags: tuple[object, ...] = ()
    config: Change | None = None
    empty_data: bool = False
    other_model: bool = False
    of_two_ranks: bool = False


CASES = {
    "empty_data": Case("holds no rows; it needs at least one with instruction", empty_data=True),
    "no_such_data": Case("data file nowhere.json does not exist", ("--train_file", "nowhere.json")),
    "no_such_model": Case("--model_name_or_path './nowhere' cannot be loaded", ("--model_name_or_path", "./nowhere")),
    "no_such_config": Case("DeepSpeed configuration 'nowhere.json' does not exist", ("--deepspeed", "nowhere.json")),
    "optimizer_block": Case('"optimizer"', config=lambda content: content.update(optimizer={"type": "AdamW"})),
    "two_budgets": Case(
        "both of budget_rank=128 and density=0.05 given; give exactly one",
        config=lambda content: content["lift"].update(budget_rank=128),
    ),
    "two_budget_flags": Case("both of budget_rank=4 and density=0.1 given; give exactly one", ("--density", 0.1)),
    "no_lift_block": Case('no top-level "lift" block', config=lambda content: content.pop("lift")),
    "no_targets": Case("gate_projj", ("--target_modules", "gate_projj")),
    "misspelt_flag": Case(
        "unknown argument --refresh_intervall; did you mean --refresh_interval?", ("--refresh_intervall", 3)
    ),
    "another_model": Case("a checkpoint of another model or budget: ", other_model=True),
    "other_ranks": Case(
        "saved on 2 ranks in ZeRO stage 2, this run has 1 in stage 2; convert it first: python -m lift_ds.universal",
        of_two_ranks=True,
    ),
    "states_on_disk": Case(
        'offload_optimizer.device="nvme", from which a Trainer cannot resume',
        config=lambda content: content["zero_optimization"].update(
            stage=3, offload_optimizer={"device": "nvme", "nvme_path": "disk"}
        ),
        of_two_ranks=True,
    ),
    "too_short": Case(
        "--max_length 4 leaves no token of the answer in any of the 60 training rows; the shortest needs --max_length ",
        ("--max_length", 4),
    ),
    "all_too_long": Case(
        "--max_length 4 with --drop_long_rows leaves none of the 60 training rows; the shortest needs --max_length ",
        ("--max_length", 4, "--drop_long_rows"),
    ),
    "no_checkpoint_yet": Case("holds no whole checkpoint; 'auto' would start", ("--resume_from_checkpoint", "last")),
    "no_checkpoint": Case("nowhere: no such folder", ("--resume_from_checkpoint", "nowhere")),
}


@pytest.fixture(scope="module")
def refusals(
    material: Material, eight_steps: Finished, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """How each of the cases ended in one process."""
    folder = tmp_path_factory.mktemp("refusals")
    (folder / "empty.jsonl").write_text("\n")
    lines: dict[str, list[str]] = {}
    for name, case in CASES.items():
        (folder / name).mkdir()
        config = config_with(folder / name, case.config or (lambda content: None))
        flags = material.flags(folder / name / "out", "--deepspeed", config, *case.flags)
        if case.empty_data:
            flags += ["--train_file", folder / "empty.jsonl"]
        if case.other_model:
            flags += ["--model_name_or_path", material.other_base]
        if case.other_model or case.of_two_ranks:
            flags += ["--resume_from_checkpoint", eight_steps.output / "checkpoint-4"]
        lines[name] = [str(flag) for flag in flags]
    (folder / "cases.json").write_text(json.dumps(lines))
    script = Path(__file__).parent / "refusals.py"
    finish([sys.executable, str(script), str(folder / "cases.json"), str(folder / "results.json")], folder, limit=400)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_one_process_says_what_is_wrong(name: str, refusals: dict[str, dict[str, Any]]) -> None:
    result = refusals[name]
    assert result["code"] == REFUSED, result
    assert len(re.findall("error: ", result["output"])) == 1, result["output"]
    assert CASES[name].message in result["output"]
    assert "Traceback" not in result["output"]
    assert result["seconds"] < BOUND_SECONDS
