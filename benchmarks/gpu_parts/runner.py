"""Runs the cells of a part: each batch in a process of its own, which writes what it finds into the book.

A device that was used wrongly stays unusable for its process, an engine that failed may leave DeepSpeed in any state,
and a kernel may never end. So a process ends after a cell that failed, unless it has no engines and the device still
answers, and the rest have a fresh one. And this process watches how long a cell takes, and ends what hangs.
On the host the processes are forked from this one, which has imported everything; with a GPU they are spawned.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing import SignalException

from benchmarks.gpu_parts.book import Book
from benchmarks.gpu_parts.cells import FAILED, PASSED, SKIPPED, Batch, Cell, SkippedError
from benchmarks.measure.ranks import Node, RankError, process_group, run_on_node
from benchmarks.measure.records import Record

#: Seconds that a process may take to begin its first cell, or to end after its last: imports, and NCCL.
_START = 150.0
#: Seconds beyond the budget after which whatever still runs is ended.
_GRACE = 45.0
#: Exit code of a process that ends because a cell failed.
_AFTER_FAILURE = 9
#: Lines of a traceback that a result keeps.
_TRACEBACK_LINES = 16


def prepare(device: str, imports: Sequence[str]) -> None:
    """Set what the processes are to find in their environment, and import what forked ones share."""
    # It logs as an error of its own, at length, what is recorded here.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    os.environ |= {"DS_ACCELERATOR": device, "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}  # there is one rank
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        for name in imports:
            with contextlib.suppress(ImportError):  # the cell that needs it says so
                importlib.import_module(name)


def run_batches(batches: Sequence[Batch], book: Book, device: str, budget: float) -> None:
    """Run what is left of a part, as far as the time goes.

    Args:
        batches: of the part.
        book: its results; cells that are done are not run again.
        device: "cuda" or "cpu".
        budget: seconds; a cell is not begun that may not end within them, but for the first.
    """
    deadline = time.time() + budget
    book.note_interruption()
    tried: set[str] = set()
    for batch in batches:
        while cells := [cell for cell in book.left(batch.cells) if cell.name not in tried]:
            if tried and time.time() + cells[0].expected > deadline:
                return
            tried |= _run_in_a_process(cells, batch.group, book, device, deadline, first=not tried)
            if time.time() > deadline + _GRACE:
                return


def _run_in_a_process(
    cells: list[Cell], group: bool, book: Book, device: str, deadline: float, *, first: bool
) -> set[str]:
    """Run cells until one fails or the time is up; return the names of those that came to an end."""
    watch = _Watch(book, {cell.name: cell for cell in cells}, deadline + _GRACE)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (cells, book.path, device, deadline, first)
        try:
            job = _work_in_group if group else _work
            run_on_node(job, arguments, Node(1), Path(folder), device, limit=10**6, wanted=watch.look)
            error = None
        except RankError as ended:
            if isinstance(ended.__cause__, SignalException):  # this process is to end; the next run goes on
                raise SystemExit(str(ended)) from ended
            error = ended
    watch.look()
    if watch.out_of_time:
        book.note_interruption()
    elif error is not None:
        hung = (book.content["under_way"] or {}).get("name")
        # A process that did not come to its first cell would not come to the others either.
        wrong = [hung] if hung else [] if watch.ended else [cell.name for cell in cells]
        message = watch.overdue or f"its process ended: {error}"
        for name in wrong:
            book.end(name, FAILED, time.time() - watch.since, {"message": _shortened(message)})
        watch.look()
    return watch.ended


class _Watch:
    """Looks into the book while a process writes it: prints what is new, and finds out what takes too long."""

    def __init__(self, book: Book, cells: dict[str, Cell], end: float) -> None:
        self._book = book
        self._cells = cells
        self._end = end
        self._before = {name: entry for name, entry in book.cells.items() if name in cells}
        self._written = 0
        self.since = time.time()
        self.ended: set[str] = set()
        self.overdue = ""
        self.out_of_time = False

    def look(self) -> bool:
        """Tell whether the process may go on."""
        written = self._book.path.stat().st_mtime_ns
        if written != self._written:
            self._written = written
            self._book.read()
            self._print_new()
        under_way, now = self._book.content["under_way"], time.time()
        if under_way and under_way["name"] in self._cells:
            self.since = under_way["since"]
            limit = self._cells[under_way["name"]].limit
        else:
            self.since, limit = max(self.since, self._written / 1e9), _START
        if now - self.since > limit:
            self.overdue = f"not done within {limit:g} s"
        self.out_of_time |= now > self._end
        return not (self.overdue or self.out_of_time)

    def _print_new(self) -> None:
        for name, entry in self._book.cells.items():
            known = name in self.ended or name not in self._cells
            if not known and self._before.get(name) != entry:
                self.ended.add(name)
                print(line_of(name, entry), flush=True)


def line_of(name: str, entry: Record) -> str:
    """Return the line that is printed of a cell."""
    why = entry.get("message") or entry.get("reason") or ""
    return f"{entry['state']:8} {entry['seconds']:7.1f} s  {name}{': ' * bool(why)}{why.partition(chr(10))[0]}"


def _work_in_group(cells: list[Cell], path: Path, device: str, deadline: float, first: bool) -> None:
    with process_group(device, limit=_START, threads=1):
        _work(cells, path, device, deadline, first, engines=True)


def _work(cells: list[Cell], path: Path, device: str, deadline: float, first: bool, *, engines: bool = False) -> None:
    """Run cells in this process and write what comes of each; after one that failed the process may end."""
    book = Book(path)
    for number, cell in enumerate(cells):
        if not (first and number == 0) and time.time() + cell.expected > deadline:
            return
        book.begin(cell.name)
        start = time.monotonic()
        state, found = _outcome(lambda cell=cell: cell.run(device, *cell.arguments))  # type: ignore[misc]
        book.end(cell.name, state, time.monotonic() - start, found)
        if state == FAILED and (engines or not _answers(device)):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(_AFTER_FAILURE)


def _outcome(run: Callable[[], Record]) -> tuple[str, Record]:
    try:
        return PASSED, run()
    except SkippedError as reason:
        return SKIPPED, {"reason": str(reason)}
    except Exception as error:  # whatever a device or a library answers
        traceback.print_exc()
        said = str(error).strip() or "no message"
        lines = "".join(traceback.format_exception(error)).splitlines()[-_TRACEBACK_LINES:]
        return FAILED, {"message": _shortened(f"{type(error).__name__}: {said}"), "traceback": lines}


def _answers(device: str) -> bool:
    """Tell whether the device still does what it is told."""
    try:
        return torch.ones(2, device=device).sum().item() == 2.0
    except RuntimeError:
        return False


def _shortened(message: str) -> str:
    return message if len(message) <= 3000 else f"{message[:1500]}\n...\n{message[-1500:]}"
