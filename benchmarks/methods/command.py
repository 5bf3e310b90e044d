"""The command of the comparison: its options, its loop over the cells, what it leaves behind."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.measure.tables import FAILED, OK, Row, alone_in, write_rows
from benchmarks.methods.cells import BASE, Cell, cell_of, cells_of, choose, left_to_do
from benchmarks.methods.forked import end_with
from benchmarks.methods.plots import draw_all
from benchmarks.methods.report import write_report
from benchmarks.methods.studies import STUDIES, Study
from benchmarks.methods.summary import with_rises
from benchmarks.methods.table import COLUMNS, read_rows, with_row

if TYPE_CHECKING:
    from benchmarks.methods.runs import Runs

TABLE, REPORT = "runs.csv", "report.md"

_DESCRIPTION = """\
Compare ways to fine-tune one pretrained model: what is learned, and what is forgotten.

    python -m benchmarks.methods --study skill --model MODEL --data DATA --output DIR

A run that has a row in runs.csv is not run again: start the command again to go on."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.methods", description=_DESCRIPTION, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--study", choices=STUDIES, required=True, help="what is compared; benchmarks/methods/studies.py has it")
    add("--model", type=Path, required=True, help="folder of the pretrained model")
    add("--data", type=Path, required=True, help="folder with commonsense_train.json and the data of the tasks")
    add("--output", type=Path, required=True, help="folder for the table, the report, the plots and the logs")
    add("--only", default="*", metavar="PATTERN", help="run the cells whose name fits: lift, or 'tune-*-lora-*'")
    add("--at_once", type=_at_least_1, default=1, metavar="N", help="runs at a time (1)")
    add("--budget_seconds", type=float, metavar="S", help="start no run after so many seconds")
    add("--retry", action="store_true", help="run the cells again that failed before")
    add("--list", action="store_true", help="show the cells, and run nothing")
    add("--report", action="store_true", help="write the report and the plots anew, and run nothing")
    return parser.parse_args(arguments)


def _at_least_1(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cells that have no row yet; then report and draw.

    Returns:
        0; 1 when the table has cells that failed; 2 for settings that cannot be used.
    """
    args = parse_arguments(arguments)
    study, output = STUDIES[args.study], args.output
    with ExitStack() as held:
        try:
            rows = read_rows(output / TABLE)
            if args.list:
                return show(study, rows)
            output.mkdir(parents=True, exist_ok=True)
            held.enter_context(alone_in(output))
            if not args.report:
                rows = run(args, study, output, rows)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted; the same command goes on", file=sys.stderr)
            return 130
        return conclude(study, output, rows)


def show(study: Study, rows: Sequence[Row]) -> int:
    """Print each cell that is known by now with what became of it."""
    status = {cell_of(row): row["status"] for row in rows}
    cells = cells_of(study, rows)
    for cell in cells:
        print(f"{ {OK: 'done', FAILED: 'failed'}.get(status.get(cell, ''), 'open'):6}  {cell.name}")
    waiting = [
        f"{task.name} {method.name}"
        for task in study.tasks
        for method in study.methods
        if choose(study, task, method, rows) is None
    ]
    if waiting:
        print(f"counted runs follow once a learning rate is chosen: {', '.join(waiting)}")
    counts = Counter(status.get(cell, "open") for cell in cells)
    print(f"{len(cells)} cells: {counts[OK]} done, {counts[FAILED]} failed, {counts['open']} open")
    return 0


def run(args: argparse.Namespace, study: Study, output: Path, rows: list[Row]) -> list[Row]:
    """Run what is left to do, and write the table after each run.

    Returns:
        The rows of all runs so far.

    Raises:
        ValueError: the model or the data cannot be used, or the table is of other settings.
    """
    # Here: the report needs none of what training imports.
    from benchmarks.methods.runs import Runs
    from benchmarks.methods.texts import write_material

    if not (args.model / "config.json").is_file():
        raise ValueError(f"--model {args.model}: there is no config.json; give the folder of a pretrained model")
    material = write_material(study, args.data, output / "data")
    runs = Runs(study, args.model, args.data, output, material)
    check_commands(runs, rows)
    began, attempted, ran = time.monotonic(), set[Cell](), 0
    under_way: dict[Future[Row], Cell] = {}

    def may_start() -> bool:
        return args.budget_seconds is None or time.monotonic() - began <= args.budget_seconds

    with ProcessPoolExecutor(args.at_once, get_context("fork"), initializer=end_with, initargs=(os.getpid(),)) as pool:
        while True:
            known = left_to_do(cells_of(study, rows), rows, retry=args.retry, only=args.only)
            todo = [cell for cell in known if cell not in attempted]
            for cell in todo[: args.at_once - len(under_way)] if may_start() else []:
                attempted.add(cell)
                under_way[pool.submit(runs.run, cell)] = cell
            if not under_way:
                print(_ending(ran, todo, args.budget_seconds))
                return rows
            for done in wait(under_way, return_when=FIRST_COMPLETED).done:
                row = done.result() | {"at_once": args.at_once}
                rows = with_rises(with_row(rows, row))
                write_rows(output / TABLE, COLUMNS, rows)
                ran += 1
                print(f"[{len(rows)}] {under_way.pop(done).name}: {said(row)}", flush=True)


def _ending(ran: int, todo: Sequence[Cell], budget_seconds: float | None) -> str:
    if todo:
        return f"--budget_seconds {budget_seconds:g} are over: ran {ran}; {len(todo)} known cells are left"
    return f"ran {ran}" if ran else "nothing left to run"


def said(row: Row) -> str:
    """Return a run's result in a line."""
    if row["status"] != OK:
        return f"failed: {row['error']}"
    asked = "" if row["exact_match"] is None else f"exact match {row['exact_match']:.3f}, "
    return f"{asked}loss {row['target_loss']:.3f}, general {row['general_loss']:.3f}"


def check_commands(runs: Runs, rows: Sequence[Row]) -> None:
    """Refuse to add to a table of other settings, whose runs would not compare.

    Raises:
        ValueError: a row's command is not the one that its cell has now.
    """
    methods = {BASE, *(method.name for method in runs.study.methods)}
    for row in rows:
        cell = cell_of(row)
        if cell.study == runs.study.name and cell.method in methods:
            for name, command in runs.commands(cell).items():
                if row[name] != command:
                    raise ValueError(
                        f"{runs.output / TABLE}: {cell.name} was run by other settings ({name}: {row[name]}), "
                        f"which are now: {command}; name another folder by --output"
                    )


def conclude(study: Study, output: Path, rows: Sequence[Row]) -> int:
    """Write the report and the plots."""
    rows = [row for row in rows if row["study"] == study.name]
    pictures = draw_all(output, study, rows)
    write_report(output / REPORT, study, rows, pictures)
    print(f"written to {output}: {', '.join([TABLE, REPORT, *pictures])}")
    return 1 if any(row["status"] == FAILED for row in rows) else 0
