"""Commonsense questions as commonsense-170K words them, taken apart into the columns that a task of the harness reads.

Please choose the correct answer to the question: QUESTION

Answer1: CHOICE Answer2: CHOICE

Answer format: answer1/answer2
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_FORMAT = "Answer format:"

#: What comes before the question, longest first, since some begin alike.
_OPENINGS = (
    "Please choose the correct answer to fill in the blank to complete the given sentence:",
    "Please choose the correct ending to complete the given sentence:",
    "Please answer the following question with true or false, question:",
    "Please choose the correct solution to the question:",
    "Please choose the correct answer to the question:",
)

Columns = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """A question of choices."""

    text: str
    choices: tuple[str, ...]  # empty where the question is answered by true or false
    labels: tuple[str, ...]  # what the answer may be, a label a choice


def legal_labels(instruction: str) -> tuple[str, ...]:
    """Return the labels that an instruction allows, by its last line.

    Args:
        instruction: in the wording above.

    Returns:
        For example ("answer1", "answer2").

    Raises:
        ValueError: it names none.
    """
    _, found, listed = instruction.rpartition(_FORMAT)
    labels = tuple(label.strip() for label in listed.split("/"))
    if not found or len(labels) < 2 or not all(labels):
        raise ValueError(f"'instruction' does not end in {_FORMAT!r} and the legal answers, such as true/false")
    return labels


def take_apart(instruction: str) -> Question:
    """Return question, choices and labels of an instruction.

    Args:
        instruction: in the wording above.

    Raises:
        ValueError: it is worded otherwise.
    """
    labels = legal_labels(instruction)
    opening = next((opening for opening in _OPENINGS if instruction.startswith(opening)), None)
    if opening is None:
        raise ValueError(f"'instruction' does not begin with a known sentence, such as {_OPENINGS[-1]!r}")
    body = instruction[len(opening) : instruction.rindex(_FORMAT)]
    if labels == ("true", "false"):
        return Question(body.strip(), (), labels)
    places: list[int] = []
    for label in labels:
        place = body.find(f"{label.capitalize()}:", places[-1] if places else 0)
        if place < 0:
            raise ValueError(f"'instruction' has no {label.capitalize()!r} followed by a colon")
        places.append(place)
    parts = zip(labels, places, [*places[1:], len(body)], strict=True)
    choices = tuple(body[start + len(label) + 1 : end].strip() for label, start, end in parts)
    return Question(body[: places[0]].strip(), choices, labels)


def columns(task: str, instruction: str, answer: str) -> Columns:
    """Return a row as a task of the harness reads it.

    Args:
        task: its name in the harness, one of `STOCK`.
        instruction: in the wording above.
        answer: one of the labels.

    Raises:
        ValueError: the instruction is worded otherwise, or the answer is no label.
    """
    question = take_apart(instruction)
    if answer not in question.labels:
        raise ValueError(f"'answer' is {answer!r}; the instruction allows {', '.join(question.labels)}")
    return _COLUMNS[task](question, question.labels.index(answer))


def _lettered(question: Question, right: int) -> Columns:
    letters = [chr(ord("A") + index) for index in range(len(question.choices))]
    return {"choices": {"text": list(question.choices), "label": letters}, "answerKey": letters[right]}


def _arc(question: Question, right: int) -> Columns:
    return {"question": question.text, **_lettered(question, right)}


def _openbookqa(question: Question, right: int) -> Columns:
    return {"question_stem": question.text, **_lettered(question, right)}


def _piqa(question: Question, right: int) -> Columns:
    first, second = question.choices
    return {"goal": question.text, "sol1": first, "sol2": second, "label": right}


def _winogrande(question: Question, right: int) -> Columns:
    if "_" not in question.text:
        raise ValueError("'instruction' has no blank ('_') in its sentence")
    first, second = question.choices
    return {"sentence": question.text, "option1": first, "option2": second, "answer": str(right + 1)}


def _social_iqa(question: Question, right: int) -> Columns:
    # The task joins the two by a space, so that its prompt is the same wherever they are cut.
    context, _, asked = question.text.rpartition(" ")
    a, b, c = question.choices
    return {"context": context, "question": asked, "answerA": a, "answerB": b, "answerC": c, "label": str(right + 1)}


def _hellaswag(question: Question, right: int) -> Columns:
    activity, colon, context = question.text.partition(": ")
    if not colon:
        raise ValueError("'instruction' has no activity, followed by a colon, before its sentence")
    # The last part, where it is no whole sentence, is a column of its own, which the task writes with a capital.
    part = re.search(r"(?<=[.!?]) ([^.!?A-Z][^.!?]*)$", context)
    begun = part[1] if part else ""
    return {
        "activity_label": activity,
        "ctx_a": context[: part.start()] if part else context,
        "ctx_b": begun,
        "endings": list(question.choices),
        "label": str(right),
    }


_COLUMNS: dict[str, Callable[[Question, int], Columns]] = {
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "openbookqa": _openbookqa,
    "piqa": _piqa,
    "winogrande": _winogrande,
    "social_iqa": _social_iqa,
    "hellaswag": _hellaswag,
}

#: Tasks of the harness whose columns can be had from this wording.
STOCK = frozenset(_COLUMNS)
