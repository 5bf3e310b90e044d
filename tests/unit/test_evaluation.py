"""Pins which held-out rows launch/train.py evaluates, and what it says of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset

from lift_ds.training.data import choose
from lift_ds.training.demo import base
from lift_ds.training.evaluation import of_demo, of_held_out

ROWS = Dataset.from_list([{"prompt": str(number), "completion": "x"} for number in range(423)])


def test_of_many_rows_some_are_evaluated_and_the_log_says_so() -> None:
    evaluation = of_held_out(ROWS, 200, seed=42)
    assert isinstance(evaluation.rows, Dataset)
    assert len(set(evaluation.rows["prompt"])) == 200
    assert evaluation.announcement(192) == (
        "evaluating 192 held-out rows before the first step; 200 of 423 were picked by --seed 42 "
        "(--eval_max_rows 200; 0 for all)"
    )
    assert evaluation.metrics == {"eval_loss": "held-out rows"}


@pytest.mark.parametrize("most", [0, 423, 1000])
def test_all_rows_are_evaluated_where_they_are_few_or_no_limit_is_set(most: int) -> None:
    """They stay in their order, so that a run without the limit evaluates what it always has."""
    evaluation = of_held_out(ROWS, most, seed=42)
    assert isinstance(evaluation.rows, Dataset)
    assert evaluation.rows.to_list() == ROWS.to_list()
    assert evaluation.announcement(423) == "evaluating 423 held-out rows before the first step"


def test_the_choice_follows_the_seed() -> None:
    """Every rank chooses for itself, so the choice must depend on nothing but data and seed."""
    assert choose(ROWS, 20, seed=3)["prompt"][:] == choose(ROWS, 20, seed=3)["prompt"][:]
    assert choose(ROWS, 20, seed=3)["prompt"][:] != choose(ROWS, 20, seed=4)["prompt"][:]
    assert choose(ROWS, 20, seed=3)["prompt"][:] != ROWS["prompt"][:20], "not the first ones, which may be of one kind"


def test_the_generated_run_evaluates_all_of_its_rows(tmp_path: Path) -> None:
    problems = [{"instruction": f"{number}?", "output": "x"} for number in range(300)]
    stories = [{"text": f"Story {number}."} for number in range(250)]
    (tmp_path / base.HELD_OUT_FILE).write_text(json.dumps(problems))
    (tmp_path / base.STORIES_FILE).write_text(json.dumps(stories))
    evaluation = of_demo(tmp_path)
    assert isinstance(evaluation.rows, dict)
    assert {name: len(rows) for name, rows in evaluation.rows.items()} == {"problems": 300, "stories": 250}
    assert evaluation.announcement(550) == "evaluating 550 held-out rows before the first step"
    assert list(evaluation.metrics) == ["eval_problems_loss", "eval_stories_loss"]
