"""The files of a study, in its work folder: rows to train on, to choose by and to test on, and what may be forgotten.

General text is Python's own language reference, which every Python carries as a module. Its wording follows Python's
version, which the table of the study has.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from benchmarks.methods import skill
from benchmarks.methods.cells import TUNE
from benchmarks.methods.studies import Study, Task
from lift_ds.runtime.files import write_whole
from lift_ds.training.data import read_rows

#: Files of the data folder.
PROBLEMS, QUESTIONS = "math_train.json", "commonsense_train.json"

#: Of every choice of rows and windows; a study has no other, so that all its runs see the same.
_SEED = 0


@dataclass(frozen=True)
class Material:
    """Where the files of a study lie.

    Args:
        folder: of all of them.
    """

    folder: Path

    @property
    def texts(self) -> Path:
        """General text."""
        return self.folder / "texts.json"

    @property
    def prompts(self) -> Path:
        """Questions of other tasks."""
        return self.folder / "prompts.json"

    def training(self, task: Task) -> Path:
        """Rows to train on."""
        return self.folder / task.name / "train.json"

    def answers(self, task: Task, phase: str) -> Path:
        """Rows whose answers are asked for."""
        return self.folder / task.name / ("validation.json" if phase == TUNE else "test.json")

    def outputs(self, task: Task, phase: str) -> Path:
        """Rows on whose outputs the loss is measured."""
        return self.folder / task.name / ("validation.json" if phase == TUNE else "test_outputs.json")


def write_material(study: Study, data: Path, folder: Path) -> Material:
    """Write the files of a study; the same study and data give the same files.

    Args:
        study: what is compared.
        data: folder of the data.
        folder: where to.

    Raises:
        ValueError: a file of the data is missing, or has too few rows.
    """
    material = Material(folder)
    _write(material.texts, general_texts(study.texts, study.window))
    _write(material.prompts, _sample(_rows(data / QUESTIONS), study.prompts, QUESTIONS))
    for task in study.tasks:
        train, validation, test = split(task, data)
        _write(material.training(task), train)
        _write(material.answers(task, TUNE), validation)
        _write(material.outputs(task, ""), test)
        asked = (
            test if task.test_file is None else _sample(_rows(data / task.test_file), task.test_rows, task.test_file)
        )
        _write(material.answers(task, ""), asked)
    return material


def general_texts(count: int, window: int) -> list[dict[str, str]]:
    """Return windows of Python's language reference, each the beginning of a part of a topic.

    Args:
        count: how many.
        window: characters of each.

    Raises:
        ValueError: there are not so many.
    """
    windows = [
        text[start : start + window]
        for _, text in sorted(topics.items())
        for start in range(0, len(text) - window + 1, window)
    ]
    if count > len(windows):
        raise ValueError(f"Python's language reference has {len(windows)} windows of {window} characters, not {count}")
    return [{"text": text} for text in random.Random(_SEED).sample(windows, count)]


def split(task: Task, data: Path) -> tuple[list[Any], list[Any], list[Any]]:
    """Return the rows of a task to train on, to choose by and to test on; no row is in two of them.

    Raises:
        ValueError: there are too few.
    """
    sizes = (task.train_rows, task.validation_rows, task.test_rows)
    if task.source == "math":
        # Answers that are letters are left out: those of the test are numbers.
        fitting = [row for row in _rows(data / PROBLEMS) if _length(row) <= task.longest and _is_number(row["answer"])]
        different = list({row["instruction"]: row for row in fitting}.values())
        rows = _sample(different, sum(sizes), f"{PROBLEMS}, of at most {task.longest} characters and with a number")
    else:
        rows = skill.rows_of(task.source, sum(sizes), _SEED)
    ends = sizes[0], sizes[0] + sizes[1]
    return rows[: ends[0]], rows[ends[0] : ends[1]], rows[ends[1] :]


def _length(row: dict[str, str]) -> int:
    return len(row["instruction"]) + len(row["output"])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _rows(path: Path) -> list[Any]:
    return [row for _, row in read_rows(path)]


def _sample(rows: list[Any], count: int, source: str) -> list[Any]:
    if count > len(rows):
        raise ValueError(f"{count} rows are wanted of {source}, which has {len(rows)}")
    return random.Random(_SEED).sample(rows, count)


def _write(path: Path, rows: Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(list(rows), indent=1) + "\n")
