"""Pins the comparison of methods from its command to its report, by real runs of a model a few entries wide: a study
that is killed goes on where it was, one that is finished runs nothing, every method sees the same rows in the same
order, and settings that would not compare are refused.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest

from benchmarks.measure.tables import OK
from benchmarks.methods import command
from benchmarks.methods.cells import BASE, cell_of
from benchmarks.methods.table import read_rows
from lift_ds.training.demo.base import BaseSettings, build_base

TINY = BaseSettings(
    hidden_size=32, layers=1, heads=2, intermediate_size=64, vocab_size=320, block_size=32, batch_size=2, steps=2,
    stories=60, problems=20, held_out=8,
)  # fmt: skip

#: Of the study: the base twice, and each of two methods with one rate and one seed, then with two seeds.
RUNS = 8

#: Longest wait for a study to have made its first runs.
SECONDS = 120.0


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("methods")
    for name in ("base", "data"):
        (folder / name).mkdir()
    build_base(folder / "base", TINY)
    questions = [
        {"instruction": f"Is it {n}?", "input": "", "output": f"It is {n}.", "answer": "true"} for n in range(4)
    ]
    (folder / "data" / "commonsense_train.json").write_text(json.dumps(questions))
    return [
        *("--study", "smoke", "--model", str(folder / "base"), "--data", str(folder / "data")),
        *("--output", str(folder / "out")),
    ]


def kill_in_the_middle(arguments: list[str], table: Path) -> None:
    """Start a study in a process of its own, and kill it once it has made two runs."""
    child = os.fork()
    if child == 0:
        try:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            command.main(arguments)
        finally:
            os._exit(0)
    deadline = time.monotonic() + SECONDS
    try:
        while len(read_rows(table)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_study_from_its_command_to_its_report(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    output = Path(arguments[-1])
    table = output / command.TABLE
    kill_in_the_middle(arguments, table)
    before = read_rows(table)
    assert 2 <= len(before) < RUNS

    assert command.main([*arguments, "--budget_seconds", "0"]) == 0
    assert "--budget_seconds 0 are over: ran 0" in capsys.readouterr().out
    assert read_rows(table) == before

    assert command.main(arguments) == 0
    rows = read_rows(table)
    assert f"ran {RUNS - len(before)}" in capsys.readouterr().out
    assert rows[: len(before)] == before
    assert len({cell_of(row) for row in rows}) == len(rows) == RUNS
    for row in rows:
        assert row["status"] == OK, row["error"]
        measured = (
            "exact_match",
            "target_loss",
            "general_loss",
            "general_loss_rise",
            "divergence",
            "evaluation_seconds",
        )
        assert None not in [row[name] for name in measured]
    trained = [row for row in rows if row["method"] != BASE]
    assert {(row["steps"], row["tokens"] > 0) for row in trained} == {(4, True)}
    assert {row["divergence"] < 1e-6 for row in trained} == {False}
    assert all(row["general_loss_rise"] == row["divergence"] == 0 for row in rows if row["method"] == BASE)

    by_seed = {(row["method"], row["seed"]): row["first_loss"] for row in trained if row["phase"] == "count"}
    for seed in (1, 2):  # before anything is trained the loss depends on the rows alone
        assert by_seed["full", seed] == pytest.approx(by_seed["lift", seed], abs=1e-6)
    assert by_seed["full", 1] != pytest.approx(by_seed["full", 2], abs=1e-6)

    assert shlex.split(trained[-1]["command"])[:2] == ["lift-ds", "train"]
    assert list((output / "runs").iterdir()) == []
    report = (output / command.REPORT).read_text()
    assert "Runs that have not been made yet" not in report
    assert "so that the methods did not see the same rows" not in report
    assert "### Differences to full" in report
    assert (output / "units_tradeoff.svg").stat().st_size > 0

    assert command.main(arguments) == 0
    assert "nothing left to run" in capsys.readouterr().out
    assert read_rows(table) == rows

    elsewhere = [*arguments[:2], "--model", str(output.parent / "other"), *arguments[4:]]
    assert command.main(elsewhere) == 2
    assert "there is no config.json" in capsys.readouterr().err
    (output.parent / "other").symlink_to(output.parent / "base")
    assert command.main(elsewhere) == 2
    assert "was run by other settings" in capsys.readouterr().err
    assert command.main([*elsewhere, "--report"]) == 0
