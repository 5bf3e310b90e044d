"""Rows of local files for the tasks: which file, and each row checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from lift_ds.evaluation import answers, wording
from lift_ds.training.data import instruction_prompt, read_rows

Row = dict[str, Any]

#: Spellings of files -> names of tasks.
_SPELLINGS = {"social_i_qa": "social_iqa", "siqa": "social_iqa"}


def find_file(folder: Path, name: str) -> Path:
    """Find the test file of a data set.

    Args:
        folder: with files `NAME_test.json`, `NAME_test200.json` or the like, or folders `NAME` with a `test.json`.
        name: of the data set; capitals, and "-" for "_", are the same.

    Raises:
        ValueError: there is none, or more than one.
    """
    if not folder.is_dir():
        raise ValueError(f"--data {folder}: no such folder")
    there = sorted([*folder.glob("*_test*.json"), *folder.glob("*/test.json")])
    found = [path for path in there if _data_set(path) == name]
    if len(found) == 1:
        return found[0]
    names = ", ".join(str(path.relative_to(folder)) for path in (found or there))
    if found:
        raise ValueError(f"--data {folder} holds {len(found)} files for {name!r}: {names}; leave one there")
    raise ValueError(
        f"--data {folder} holds no file for {name!r}, such as {name}_test.json; it holds {names or 'no test file'}"
    )


def _data_set(path: Path) -> str:
    """Return whose test file it is, as tasks spell it."""
    spelled = path.parent.name if path.name == "test.json" else re.sub(r"_test[^/]*$", "", path.stem)
    plain = spelled.lower().replace("-", "_")
    return _SPELLINGS.get(plain, plain)


def instruction_rows(path: Path, check: Callable[[str, str], None] | None = None) -> Dataset:
    """Read rows to be answered by generation.

    Args:
        path: JSON array or JSON lines of rows with `instruction`, `answer` and perhaps `input`; or with `prompt`, which
            is used as it is, and `answer`.
        check: raises ValueError where an instruction and its answer cannot be scored.

    Returns:
        Rows of prompt, instruction, input and answer, all text.

    Raises:
        ValueError: the file or a row cannot be used; names the file and the row.
    """

    def converted(row: Row) -> Row:
        if check is not None:
            check(row["instruction"], row["answer"])
        return row

    return _dataset(path, converted)


def stock_rows(path: Path, task: str) -> Dataset:
    """Read rows in commonsense-170K's wording as the columns that a task of the harness reads.

    Args:
        path: as for `instruction_rows`.
        task: one of `wording.STOCK`.

    Raises:
        ValueError: the file or a row cannot be used; names the file and the row.
    """
    return _dataset(path, lambda row: wording.columns(task, row["instruction"], row["answer"]))


def _dataset(path: Path, converted: Callable[[Row], Row]) -> Dataset:
    rows = []
    for where, raw in read_rows(path):
        try:
            rows.append(converted(_plain(raw)))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return Dataset.from_list(rows)


def _plain(raw: Any) -> Row:
    if not isinstance(raw, Mapping):
        raise ValueError(f"a row must be a JSON object, not {type(raw).__name__}")
    prompt, answer = raw.get("prompt"), raw.get("answer")
    instruction, context = raw.get("instruction", prompt), raw.get("input") or ""
    if not isinstance(instruction, str) or not instruction.strip():
        raise ValueError("a row needs an 'instruction' or a 'prompt', a text that is not empty")
    if not isinstance(context, str):
        raise ValueError(f"'input' must be a string, not {type(context).__name__}")
    if isinstance(answer, list) and len(answer) == 1:  # so some files of the published evaluation have it
        answer = answer[0]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise ValueError(f"a row needs an 'answer', a text or a number, to be scored; this one has {answer!r}")
    if "instruction" in raw:
        prompt = instruction_prompt(instruction, context)
    return {"prompt": prompt, "instruction": instruction, "input": context, "answer": str(answer).strip()}


def need_number(instruction: str, answer: str) -> None:
    """Raise ValueError where an answer is no number."""
    if answers.last_number(answer) is None:
        raise ValueError(f"'answer' is {answer!r}; it must be a number")


def need_letter(instruction: str, answer: str) -> None:
    """Raise ValueError where an answer is no letter of a choice."""
    if answer not in tuple("ABCDE"):
        raise ValueError(f"'answer' is {answer!r}; it must be a letter, A to E")


def need_label(instruction: str, answer: str) -> None:
    """Raise ValueError where an instruction names no labels, or an answer is none of them."""
    labels = wording.legal_labels(instruction)
    if answer not in labels:
        raise ValueError(f"'answer' is {answer!r}; the instruction allows {', '.join(labels)}")
