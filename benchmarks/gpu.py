"""Everything that is to be known of LIFT on an accelerator: does it work there, and how fast is it?

    python -m benchmarks.gpu                                 # on a machine with a GPU; each part takes minutes
    python -m benchmarks.gpu --parts check                   # one part
    python -m benchmarks.gpu --plots_only --output FOLDER    # draw again what is in the JSON files of a folder

    check      kernels, parity with Algorithm 1, overflows, resuming, the watchdog, torch.compile, FlashAttention
    refresh    seconds, memory and exactness of selecting; a round of Llama-2-7B's matrices; which solver is faster
    step       a training step of full fine-tuning, LoRA and LIFT: time, memory beside the plan, the optimizer phase

Results are written after every cell, named by device and date. A run that was stopped, by its time or by force, goes
on where it was when the same command is given again; what failed is tried again. Nothing is fetched from a network.

Where there is no accelerator every part runs small on the host, to see that the script works, and the results are
written to a temporary folder: none of them is a measurement. Exit code 1 when a check failed or a goal was missed, 3
when the time was up before the end.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from pathlib import Path
from typing import cast

from benchmarks.gpu_parts import machine
from benchmarks.gpu_parts.book import Book, books, open_book
from benchmarks.gpu_parts.cells import FAILED, Part
from benchmarks.measure.records import RESULTS, Record, print_budgets

PARTS = ("check", "refresh", "step")

#: Exit codes.
MISSED, UNFINISHED = 1, 3

_ON_A_CPU = "sizes for a CPU, to see that the script works; no figure of it is a measurement"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--small", action="store_true", help="the sizes for a CPU on a GPU too: does it run at all?")
    parser.add_argument(
        "--budget_seconds", type=float, default=480.0, help="of each part; nothing is begun that would take longer"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=None,
        help="folder of the results (default: benchmarks/results/gpu; without a GPU, or small, a temporary one)",
    )
    parser.add_argument("--plots_only", action="store_true", help="measure nothing, draw what the JSON files have")
    return parser.parse_args(arguments)


def part_of(name: str) -> Part:
    """Return the module of a part."""
    return cast(Part, importlib.import_module(f"benchmarks.gpu_parts.{name}"))


def run_part(name: str, device: str, around: Record, args: argparse.Namespace) -> Book:
    """Run one part, or what is left of it; return its results."""
    part, small = part_of(name), around["sizes"] == "small"
    book = open_book(args.output, name, machine.slug(around), around)
    batches = part.batches(device, small)
    cells = [cell for batch in batches for cell in batch.cells]
    left = book.left(cells)
    print(f"\n{name}: {len(cells) - len(left)} of {len(cells)} cells are done in {book.path}", flush=True)
    if left:
        from benchmarks.gpu_parts import runner  # here: it imports DeepSpeed

        runner.prepare(device, part.IMPORTS)
        runner.run_batches(batches, book, device, args.budget_seconds)
    untried = [cell.name for cell in cells if cell.name not in book.cells]
    measured = device == "cuda" and not small
    book.update(
        finished=not untried,
        found=part.conclude(book.cells),
        budgets=part.budgets(book.cells) if measured else [],
    )
    print(part.report(book.cells, measured=measured))
    print_budgets(book.content["budgets"])
    if untried:
        print(f"the time was up with {len(untried)} cells to go, the next {untried[0]}: give the same command again")
    return book


def draw(paths: list[Path]) -> None:
    """Draw the plots of some files of results, beside them; without matplotlib it is said that there are none."""
    try:
        from benchmarks.gpu_parts import plots
    except ImportError as missing:
        print(f"no plots: {missing.name} is not installed; --plots_only draws them later from the JSON files")
        return
    for path in paths:
        plots.draw(Book(path).content, path.with_suffix(".svg"))


def exit_code(contents: list[Record]) -> int:
    """Return 0, `MISSED` or `UNFINISHED`."""
    failed = any(entry["state"] == FAILED for content in contents for entry in content["cells"].values())
    if failed or any(not entry["pass"] for content in contents for entry in content["budgets"]):
        return MISSED
    return 0 if all(content["finished"] for content in contents) else UNFINISHED


def main(arguments: list[str] | None = None) -> int:
    """Run the parts, write JSON and plots, print tables and goals."""
    args = parse_arguments(arguments)
    if args.plots_only:
        draw([path for part in args.parts for path in books(args.output or RESULTS / "gpu", part)])
        return 0
    device = machine.device_type(args.device)
    small = args.small or device == "cpu"
    why = f"no accelerator {'found' if args.device == 'auto' else 'asked for'}: {_ON_A_CPU}"
    if device == "cpu":
        print(why)
    if args.output is None:
        args.output = Path(tempfile.mkdtemp(prefix="lift_ds_gpu_")) if small else RESULTS / "gpu"
    around = machine.around(device, small=small)
    found = [run_part(name, device, around, args) for name in args.parts]
    draw([book.path for book in found])
    if device == "cpu":
        print(f"\n{why}\nwhat was written is in {args.output}")
    return exit_code([book.content for book in found])


if __name__ == "__main__":
    sys.exit(main())
