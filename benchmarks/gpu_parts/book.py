"""The file with the results of one part: written after every cell, so that whatever ends a run costs one cell at most.

    date, hardware, versions    where and when it began
    part, sizes                 "check", "refresh" or "step"; "full" or "small"
    finished                    whether every cell has been tried
    under_way, interrupted      the cell that runs now; those in which something ended a run
    cells                       name -> state, seconds, date, and what was found or why not
    found, budgets              what follows from the cells

One process writes it at a time: the one that runs cells, and before and after that the one that started it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.gpu_parts.cells import FAILED, Cell
from benchmarks.measure.records import Record
from lift_ds.runtime.files import write_whole

#: What of the surroundings has to be the same for results to stand in one file.
_SAME = (("hardware", "device"), ("hardware", "driver"), ("versions",), ("sizes",))


class Book:
    """The results of a part, in a file that one process writes at a time.

    Args:
        path: of the file, which is there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: Record = {}
        self.read()

    def read(self) -> None:
        """Take over what another process has written."""
        self.content = json.loads(self.path.read_text())

    def update(self, **entries: object) -> None:
        """Set entries at the top of the file."""
        self.content |= entries
        write_whole(self.path, json.dumps(self.content, indent=1) + "\n")

    @property
    def cells(self) -> dict[str, Record]:
        """Name of a cell -> what came of it."""
        return self.content["cells"]

    def begin(self, name: str) -> None:
        """Note that a cell begins."""
        self.update(under_way={"name": name, "since": time.time()})

    def end(self, name: str, state: str, seconds: float, found: Record) -> None:
        """Note what came of a cell."""
        date = datetime.now(UTC).isoformat(timespec="seconds")
        self.content["cells"][name] = {"state": state, "seconds": round(seconds, 3), "date": date, **found}
        self.update(under_way=None)

    def note_interruption(self) -> None:
        """Note that an earlier run was ended in the cell that was under way, if there is one."""
        if (under_way := self.content["under_way"]) is not None:
            self.update(under_way=None, interrupted=[*self.content["interrupted"], under_way["name"]])

    def left(self, cells: Iterable[Cell]) -> list[Cell]:
        """Return the cells that are not done; those that failed, or in which a run was ended, come last."""
        waiting = [cell for cell in cells if self.cells.get(cell.name, {}).get("state", FAILED) == FAILED]
        return sorted(waiting, key=lambda cell: cell.name in self.cells or cell.name in self.content["interrupted"])


def open_book(folder: Path, part: str, machine: str, around: Record) -> Book:
    """Find the results that a run goes on with, or begin new ones.

    That are the newest of the same device, versions and sizes, if they are unfinished or of today.

    Args:
        folder: of the results.
        part: whose.
        machine: what the file is named after, with date and part.
        around: date, hardware, versions and sizes.
    """
    today = around["date"][:10]
    for path in reversed(books(folder, part, machine)):
        book = Book(path)
        same = all(_entry(book.content, keys) == _entry(around, keys) for keys in _SAME)
        if same and (not book.content["finished"] or path.name.startswith(f"{machine}-{today}")):
            return book
    path = folder / f"{machine}-{today}-{part}.json"
    number = 2
    while path.exists():  # of other versions or sizes
        path = folder / f"{machine}-{today}-{number}-{part}.json"
        number += 1
    folder.mkdir(parents=True, exist_ok=True)
    empty: Record = {"finished": False, "under_way": None, "interrupted": [], "cells": {}, "found": {}, "budgets": []}
    write_whole(path, json.dumps({**around, "part": part, **empty}, indent=1) + "\n")
    return Book(path)


def books(folder: Path, part: str = "*", machine: str = "") -> list[Path]:
    """Return the files of results in a folder, oldest first."""
    return sorted(folder.glob(f"{machine}*-{part}.json"), key=lambda path: path.stat().st_mtime)


def _entry(content: Record, keys: Sequence[str]) -> object:
    found: object = content
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found
