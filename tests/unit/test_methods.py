"""Pins the comparison of methods apart from its runs: which runs a study makes and in which order, which learning rate
is chosen, what the report computes, and that the rows of a study are right and in one part only.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from benchmarks.measure.tables import FAILED, OK, Row, write_rows
from benchmarks.methods import command, skill, texts
from benchmarks.methods.cells import BASE, COUNT, TUNE, Cell, Choice, cells_of, choose, left_to_do, rates_of
from benchmarks.methods.plots import draw_all
from benchmarks.methods.report import write_report
from benchmarks.methods.runs import Runs
from benchmarks.methods.studies import STUDIES, TARGET_LOSS, Method, Study, Task
from benchmarks.methods.summary import difference, estimate, results, unequal_starts, with_rises
from benchmarks.methods.table import COLUMNS, COMMONSENSE, read_rows, row_of, with_row
from benchmarks.methods.texts import Material

TASK = Task(
    "sums", source="addition", test_file=None, train_rows=30, validation_rows=10, test_rows=20, longest=1000, steps=2,
    batch=2, max_length=64, new_tokens=8,
)  # fmt: skip
FULL = Method("full", ("--method", "full"), (1e-5, 3e-5, 1e-4))
LIFT = Method("lift", (), (1e-4, 3e-4, 1e-3))
STUDY = Study("test", (TASK,), (FULL, LIFT), tuning_seed=0, counted_seeds=(1, 2, 3), extensions=0)


def ran(phase: str, method: str, rate: float | None, seed: int | None, **measured: Any) -> Row:
    """A row of a run that came to its end."""
    row = row_of(Cell("test", phase, "sums", method, rate, seed))
    found = {"status": OK, "exact_match": 0.0, "target_loss": 1.0, "general_loss": 2.0, "divergence": 0.1}
    return row | found | {"date": "2026-01-01T00:00:00+00:00", "cpu": "some", "cores": 2} | measured


def tuned(method: str, shares: dict[float, float], **more: Any) -> list[Row]:
    return [ran(TUNE, method, rate, 0, exact_match=share, **more) for rate, share in shares.items()]


ALL_TUNED = [*tuned("full", {1e-5: 0.1, 3e-5: 0.4, 1e-4: 0.2}), *tuned("lift", {1e-4: 0.1, 3e-4: 0.5, 1e-3: 0.2})]


def test_counted_runs_follow_when_a_method_is_tuned() -> None:
    bases = [Cell("test", phase, "sums", BASE) for phase in (TUNE, COUNT)]
    first = cells_of(STUDY, [])
    assert first[:2] == bases
    assert [(c.method, c.learning_rate, c.seed) for c in first[2:]] == [
        (method.name, rate, 0) for method in (FULL, LIFT) for rate in method.learning_rates
    ]
    missing_one = ALL_TUNED[:3] + ALL_TUNED[4:]
    assert {c.method for c in cells_of(STUDY, missing_one) if c.phase == COUNT} == {"full", BASE}
    counted = [c for c in cells_of(STUDY, ALL_TUNED) if c.phase == COUNT and c.method != BASE]
    assert [(c.seed, c.method, c.learning_rate) for c in counted] == [
        (seed, method, 3e-5 if method == "full" else 3e-4) for seed in (1, 2, 3) for method in ("full", "lift")
    ]


def test_what_has_a_row_is_not_run_again_and_failures_only_when_asked() -> None:
    cells = cells_of(STUDY, ALL_TUNED)
    failed = ALL_TUNED[0] | {"status": FAILED}
    rows = with_row(ALL_TUNED, failed)
    assert len(rows) == len(ALL_TUNED)
    assert {c.phase for c in left_to_do(cells, ALL_TUNED) if c.method != BASE} == {COUNT}
    assert left_to_do(cells, rows) == left_to_do(cells, ALL_TUNED)
    again = [c for c in left_to_do(cells, rows, retry=True) if c.phase == TUNE and c.method != BASE]
    assert [(c.method, c.learning_rate) for c in again] == [("full", 1e-5)]
    assert {c.method for c in left_to_do(cells, [], only="lift")} == {"lift"}
    assert [c.name for c in left_to_do(cells, [], only="count-*-lift-*-seed3")] == ["count-sums-lift-0.0003-seed3"]


def test_the_best_share_is_chosen_and_the_loss_decides_between_equal_ones() -> None:
    assert choose(STUDY, TASK, LIFT, ALL_TUNED) == Choice(3e-4, "")
    losses = {1e-4: 0.9, 3e-4: math.nan, 1e-3: 0.8}
    equal = [ran(TUNE, "lift", rate, 0, exact_match=0.5, target_loss=loss) for rate, loss in losses.items()]
    assert choose(STUDY, TASK, LIFT, equal) == Choice(1e-3, "highest")
    other_seed = [*equal, ran(TUNE, "lift", 1e-4, 1, exact_match=1.0)]
    assert choose(STUDY, TASK, LIFT, other_seed) == Choice(1e-3, "highest")
    one_failed = [equal[0], equal[1], equal[2] | {"status": FAILED}]
    assert choose(STUDY, TASK, LIFT, one_failed) == Choice(1e-4, "lowest")
    assert choose(STUDY, TASK, LIFT, [row | {"status": FAILED} for row in equal]) is None
    assert choose(STUDY, TASK, replace(LIFT, learning_rates=(1e-3,)), equal) == Choice(1e-3, "only")


def test_where_the_loss_decides_nobody_asks_for_answers_to_choose_by(tmp_path: Path) -> None:
    by_loss = replace(TASK, decides=TARGET_LOSS)
    study = replace(STUDY, tasks=(by_loss,))
    losses = {1e-4: 0.9, 3e-4: 0.7, 1e-3: 0.8}
    rows = [ran(TUNE, "lift", rate, 0, exact_match=None, target_loss=loss) for rate, loss in losses.items()]
    rows[0] |= {"exact_match": 1.0}
    assert choose(study, by_loss, LIFT, rows) == Choice(3e-4, "")
    runs = Runs(study, tmp_path, tmp_path, tmp_path, Material(tmp_path))
    for cell in (Cell("test", TUNE, "sums", BASE), Cell("test", TUNE, "sums", "lift", 1e-3, 0)):
        assert "--rows" not in runs.evaluate_arguments(cell)[0]
        assert "--rows" in replace(runs, study=STUDY).evaluate_arguments(cell)[0]
    assert "--rows" in runs.evaluate_arguments(Cell("test", COUNT, "sums", "lift", 1e-3, 1))[0]
    rows[0] |= {"exact_match": None}
    rows = with_rises([*rows, ran(TUNE, BASE, None, None, exact_match=None)])
    write_report(tmp_path / "report.md", study, rows, draw_all(tmp_path, study, rows))
    assert "| lift | 0.900 | **0.700** | 0.800 |" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("shares", "extensions", "rates"),
    [
        ({1e-4: 0.1, 3e-4: 0.5, 1e-3: 0.2}, 1, [1e-4, 3e-4, 1e-3]),
        ({1e-4: 0.1, 3e-4: 0.2, 1e-3: 0.5}, 0, [1e-4, 3e-4, 1e-3]),
        ({1e-4: 0.1, 3e-4: 0.2, 1e-3: 0.5}, 1, [1e-4, 3e-4, 1e-3, 3e-3]),
        ({1e-4: 0.1, 3e-4: 0.2, 1e-3: 0.5, 3e-3: 0.6}, 1, [1e-4, 3e-4, 1e-3, 3e-3]),
        ({1e-4: 0.1, 3e-4: 0.2, 1e-3: 0.5, 3e-3: 0.6}, 2, [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]),
        ({1e-4: 0.5, 3e-4: 0.2, 1e-3: 0.1}, 1, [3e-5, 1e-4, 3e-4, 1e-3]),
        ({1e-4: 0.5, 3e-4: 0.2}, 1, [1e-4, 3e-4, 1e-3]),
    ],
)
def test_a_grid_grows_where_the_best_rate_is_at_its_edge(
    shares: dict[float, float], extensions: int, rates: list[float]
) -> None:
    assert rates_of(replace(STUDY, extensions=extensions), TASK, LIFT, tuned("lift", shares)) == rates


def counted(method: str, rate: float, shares: list[float], **more: Any) -> list[Row]:
    return [ran(COUNT, method, rate, seed, exact_match=share, **more) for seed, share in enumerate(shares, 1)]


def test_means_and_paired_differences_with_their_intervals() -> None:
    """By hand: the quantile of Student's t at 97.5% and 2 degrees of freedom is 4.302653."""
    found = estimate([0.1, 0.2, 0.6])
    assert found is not None
    assert (found.mean, found.count) == (pytest.approx(0.3), 3)
    assert found.half == pytest.approx(4.302653 * math.sqrt((0.04 + 0.01 + 0.09) / 2) / math.sqrt(3), rel=1e-6)
    assert estimate([]) is None
    one = estimate([0.5])
    assert one is not None
    assert one.half is None

    rows = [*ALL_TUNED, *counted("full", 3e-5, [0.1, 0.2, 0.6]), *counted("lift", 3e-4, [0.2, 0.4, 0.6])]
    rows += counted("lift", 1e-3, [0.9, 0.9, 0.9])  # not the chosen rate
    rows += [ran(COUNT, "lift", 3e-4, 7, exact_match=0.9)]  # no seed of the study
    full, lift = results(STUDY, rows)
    assert list(lift.by_seed) == [1, 2, 3]
    paired = difference(lift, full, "exact_match")  # 0.1, 0.2, 0.0
    assert paired is not None
    assert paired.mean == pytest.approx(0.1)
    assert paired.half == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
    assert difference(lift, full, "commonsense") is None


def test_the_report_says_what_was_reached_and_what_is_missing(tmp_path: Path) -> None:
    rows = [ran(phase, BASE, None, None, exact_match=0.05, general_loss=1.5) for phase in (TUNE, COUNT)]
    rows += tuned("full", {1e-5: 0.1, 3e-5: 0.2, 1e-4: 0.4}) + ALL_TUNED[3:]
    rows += counted("full", 1e-4, [0.1, 0.2, 0.6], first_loss=2.0)
    rows += counted("lift", 3e-4, [0.2, 0.3, 0.8], first_loss=2.001)
    rows[-1] |= {"first_loss": 2.1}
    rows = with_rises(rows)
    write_report(tmp_path / "report.md", STUDY, rows, ["sums_tradeoff.svg"])
    text = (tmp_path / "report.md").read_text()
    assert "- sums, full: the best learning rate, 0.0001, is the highest rate tried." in text
    assert "- Task sums, seed 3: the losses of the first step differ, from 2.0000 to 2.1000" in text
    assert unequal_starts(rows[:-1]) == []
    assert "| base | - | - | 5.0 | 1.0000 | 0.0000 | 0.1000 |" in text
    assert "| full | 0.0001 (highest) | 3 | 30.0 ± 65.7 | 1.0000 ± 0.0000 | 0.5000 ± 0.0000 |" in text
    # Of 0.1, 0.1 and 0.2; in no bold type, as the interval holds 0.
    assert "| lift | +13.3 ± 14.3 |" in text
    assert "| lift |  |  | 10.0 (1.000) | **50.0 (1.000)** | 20.0 (1.000) |" in text
    assert "Runs that have not been made yet" not in text
    write_report(tmp_path / "report.md", STUDY, [*rows[:-2], rows[-2] | {"status": FAILED, "error": "no memory"}], [])
    text = (tmp_path / "report.md").read_text()
    assert "- Runs that have not been made yet: 1." in text
    assert "- count-sums-lift-0.0003-seed2 failed: no memory" in text


def test_rows_go_through_the_csv_and_the_list_shows_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [ran(TUNE, "full", 1e-5, 0, error='it said "no",\ntwice', tokens=12), ran(COUNT, BASE, None, None)]
    write_rows(tmp_path / "runs.csv", COLUMNS, rows)
    assert read_rows(tmp_path / "runs.csv") == rows
    assert command.show(STUDY, [rows[0] | {"status": FAILED}, rows[1]]) == 0
    said = capsys.readouterr().out
    assert "failed  tune-sums-full-1e-05-seed0\n" in said
    assert "done    count-sums-base\n" in said
    assert said.endswith("8 cells: 1 done, 1 failed, 6 open\n")


def added(row: skill.Row) -> int:
    first, second = map(int, re.fullmatch(r"Add (\d+) and (\d+)\.", row["instruction"]).groups())  # type: ignore[union-attr]
    return first + second


def converted(row: skill.Row) -> int:
    days, hours, minutes = map(int, re.findall(r"\d+", row["instruction"]))
    return (days * 24 + hours) * 60 + minutes


def later(row: skill.Row) -> int:
    days, date = re.fullmatch(r"Which date is (\d+) days after (.+)\?\n", row["prompt"]).groups()  # type: ignore[union-attr]
    found = datetime.strptime(f"{date} 2025", "%B %d %Y") + timedelta(days=int(days))
    assert row["completion"].endswith(f" The answer is {found:%B} {found.day}.")
    return found.day


@pytest.mark.parametrize(("name", "solve"), [("addition", added), ("units", converted), ("later_date", later)])
def test_the_answers_and_steps_of_a_skill_are_right(name: str, solve: Any) -> None:
    rows = skill.rows_of(name, 300, 1)
    assert rows == skill.rows_of(name, 300, 1)
    assert rows != skill.rows_of(name, 300, 2)
    assert len({skill.question_of(row) for row in rows}) == 300
    for row in rows:
        output = row.get("completion") or row["output"]
        assert int(row["answer"]) == solve(row)
        assert re.findall(r"\d+", output)[-1] == row["answer"]
        sums = re.findall(r"(\d+(?: [-+*] \d+)+) = (\d+)", output)
        assert sums
        assert all(eval(left) == int(right) for left, right in sums)
        results = [right for _, right in sums]
        if name == "addition":  # a sum for each digit, from the last one on
            assert results[-1] + "".join(digit[-1] for digit in reversed(results[:-1])) == row["answer"]
        else:
            assert results[-1] == row["answer"]


def test_a_skill_without_so_many_questions_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert skill.main(["units", "--rows", "20000", "--output", str(tmp_path / "rows.json")]) == 2
    assert "--rows 20000: of the skill 'units' no more than" in capsys.readouterr().err
    with pytest.raises(ValueError, match="skill 'sums' is not one of addition, units, later_date"):
        skill.rows_of("sums", 1, 0)


def instructions(path: Path) -> set[str]:
    return {row["instruction"] for row in json.loads(path.read_text())}


def test_the_parts_of_a_task_share_no_question(tmp_path: Path) -> None:
    questions = [{"instruction": f"Is it {n}?", "output": f"It is {n}.", "answer": "answer1"} for n in range(80)]
    problems = [{"instruction": f"What is {n % 70}?", "output": "o" * (n % 2), "answer": str(n)} for n in range(150)]
    problems += [{"instruction": f"Which is {n}?", "output": "", "answer": "A"} for n in range(50)]
    (tmp_path / "commonsense_train.json").write_text(json.dumps(questions))
    (tmp_path / "math_train.json").write_text(json.dumps(problems))
    (tmp_path / "svamp_test.json").write_text(json.dumps(problems[:25]))
    math_task = replace(TASK, name="math", source="math", test_file="svamp_test.json", longest=60)
    study = replace(STUDY, tasks=(TASK, math_task), texts=3, window=500, prompts=5)
    material = texts.write_material(study, tmp_path, tmp_path / "out")
    for task in study.tasks:
        files = [material.training(task), material.outputs(task, TUNE), material.outputs(task, COUNT)]
        train, validation, test = map(instructions, files)
        assert (len(train), len(validation), len(test)) == (30, 10, 20)
        assert not train & validation | train & test | validation & test
    assert material.answers(TASK, TUNE) == material.outputs(TASK, TUNE)
    assert instructions(material.answers(TASK, COUNT)) == instructions(material.outputs(TASK, COUNT))
    assert instructions(material.answers(math_task, COUNT)) <= {row["instruction"] for row in problems[:25]}
    assert not any(name.startswith("Which") for name in instructions(material.training(math_task)))
    windows = json.loads(material.texts.read_text())
    assert [len(row["text"]) for row in windows] == [500] * 3
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json")}
    texts.write_material(study, tmp_path, tmp_path / "out")
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json")}
    with pytest.raises(ValueError, match=r"60 rows are wanted of math_train\.json, of at most 5 characters"):
        texts.split(replace(math_task, longest=5), tmp_path)


def test_the_studies_are_fair() -> None:
    """The main methods have at least four learning rates, and four counted seeds that are not the one that tunes. Smoke
    says nothing of methods.
    """
    for study in STUDIES.values():
        assert study.tuning_seed not in study.counted_seeds
        assert set(study.commonsense) <= set(COMMONSENSE)
        names = [method.name for method in study.methods]
        assert len(names) == len(set(names))
        for method in study.methods:
            assert list(method.learning_rates) == sorted(method.learning_rates)
            assert study.name == "smoke" or method.seeds is not None or len(method.learning_rates) >= 4
        assert study.name == "smoke" or len(study.counted_seeds) >= 4
