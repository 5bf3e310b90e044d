"""What the tasks of `tasks/` call: the prompt of a row, and whether the generated text is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lift_ds.evaluation import answers, wording
from lift_ds.training.data import instruction_prompt

#: The one metric of the generated tasks: the share of rows whose extracted answer is right.
METRIC = "acc"

Row = Mapping[str, Any]


def prompt(row: Row) -> str:
    """Return the prompt of a row; else its instruction in the frame that training uses."""
    return row.get("prompt") or instruction_prompt(row["instruction"], row.get("input") or "")


def expected(row: Row) -> str:
    """Return the right answer as text; some published files have it as a number, or in a list."""
    answer = row["answer"]
    return str(answer[0] if isinstance(answer, list) else answer).strip()


def number(row: Row, texts: Sequence[str]) -> dict[str, float]:
    """Score a generated text by its last number."""
    return {METRIC: float(answers.same_number(texts[0], expected(row)))}


def letter(row: Row, texts: Sequence[str]) -> dict[str, float]:
    """Score a generated text by the letter of a choice that it names."""
    return {METRIC: float(answers.letter(texts[0]) == expected(row))}


def label(row: Row, texts: Sequence[str]) -> dict[str, float]:
    """Score a generated text by the first label that its instruction allows."""
    found = answers.first_label(texts[0], wording.legal_labels(row["instruction"]))
    return {METRIC: float(found == expected(row))}


def number_or_text(row: Row, texts: Sequence[str]) -> dict[str, float]:
    """Score a generated text by its last number where the answer is a number, else by being the answer."""
    answer = expected(row)
    is_right = answers.same_number(texts[0], answer) if answers.is_number(answer) else texts[0].strip() == answer
    return {METRIC: float(is_right)}
