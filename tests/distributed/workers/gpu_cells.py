"""Runs cells that go well, fail, end their process and hang, twice; then one that takes longer than there is time.

Its argument is a folder. Saves what the book had after each run, and in which order the cells were begun.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts import machine, runner
from benchmarks.gpu_parts.book import open_book
from benchmarks.gpu_parts.cells import Batch, Cell, SkippedError


def go_well(device: str, folder: Path, name: str) -> dict[str, Any]:
    with open(folder / "begun", "a") as file:
        file.write(f"{name}\n")
    return {"process": os.getpid()}


def fail(device: str, folder: Path, name: str) -> dict[str, Any]:
    go_well(device, folder, name)
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def skip(device: str, folder: Path, name: str) -> dict[str, Any]:
    raise SkippedError("not on this machine")


def crash(device: str, folder: Path, name: str) -> dict[str, Any]:
    go_well(device, folder, name)
    print("the last words", file=sys.stderr, flush=True)
    os._exit(11)


def hang(device: str, folder: Path, name: str) -> dict[str, Any]:
    go_well(device, folder, name)
    time.sleep(1000)
    return {}


def main(folder: Path) -> None:
    cells = {"first": go_well, "fails": fail, "skips": skip, "crashes": crash, "hangs": hang, "last": go_well}
    made = [Cell(name, run, (folder, name), expected=0.0, limit=0.8) for name, run in cells.items()]
    book = open_book(folder, "cells", "cpu", machine.around("cpu", small=True))
    runner.prepare("cpu", ())
    found = []
    for _ in range(2):
        runner.run_batches([Batch(made)], book, "cpu", budget=60.0)
        found.append({"cells": dict(book.cells), "begun": (folder / "begun").read_text().split()})
        (folder / "begun").unlink()
    late = open_book(folder, "late", "cpu", machine.around("cpu", small=True))
    runner.run_batches([Batch([Cell("late", hang, (folder, "late"))])], late, "cpu", budget=0.4 - runner._GRACE)
    found.append(late.content)
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
