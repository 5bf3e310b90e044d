"""The command of a study: its options, its loop over the cells, what it leaves behind."""

from __future__ import annotations

import argparse
import shlex
import shutil
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path

from benchmarks.measure.records import Record
from benchmarks.measure.tables import alone_in
from benchmarks.scaling.cells import METHODS, STAGES, STRONG, WEAK, Cell, Grid, Sizes, make_grid
from benchmarks.scaling.job import Job, environment_of
from benchmarks.scaling.plots import draw_all
from benchmarks.scaling.predict import add_predictions
from benchmarks.scaling.report import write_report
from benchmarks.scaling.runners import CellError, Hosts, Local, Runner, Slurm, run_job
from benchmarks.scaling.table import FAILED, OK, Row, left_to_do, read_rows, row_of, with_row, write_rows

TABLE, REPORT = "measurements.csv", "report.md"

#: Columns of what a rank measures of a step, in its order.
PHASES = ("forward_seconds", "backward_seconds", "optimizer_seconds")


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, default=["full", "lora", "lift"])
    add("--stages", nargs="+", type=int, choices=STAGES, default=[2], help="of ZeRO (2)")
    add("--ranks", nargs="+", type=int, default=[1, 2], help="on all nodes together (1 2)")
    add("--nodes", nargs="+", type=int, default=[1], help="combined with the ranks that are a multiple of them (1)")
    add("--scaling", nargs="+", choices=[STRONG, WEAK], default=[STRONG, WEAK])
    add("--tokens", type=int, default=512, help="of a step: of each rank (weak), of all ranks (strong) (512)")
    add("--sequence", type=int, default=64, help="tokens of a sequence (64)")
    add("--hidden", type=int, default=512)
    add("--intermediate", type=int, default=1408)
    add("--layers", type=int, default=7)
    add("--vocabulary", type=int, default=1024)
    add("--density", type=float, default=0.05, help="of LIFT; the LoRA has nearly as many numbers (0.05)")
    add("--steps", type=int, default=5, help="timed steps of a run (5)")
    add("--repetitions", type=int, default=3, help="runs of each cell (3)")
    add("--link-name", default="network", help="what to call the link between the nodes in this invocation")
    add("--link-gbit", type=float, help="its rate in Gbit/s, one direction; without it a probe measures one")
    add("--launcher", choices=["local", "hostfile", "slurm"], default="local")
    add("--hostfile", type=Path, default=Path("hostfile"), help="lines such as `node1 slots=8`")
    add("--sbatch", default="", help='further options of sbatch, as in --sbatch="--partition=main --gpus-per-node=8"')
    add("--queue-limit", type=float, default=3600, help="seconds a job of SLURM may wait (3600)")
    add("--interface", help="network interface of every node; counted are its bytes (lo; eth0 unless local)")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--threads", type=int, default=1, help="of a rank on the CPU (1)")
    add("--limit", type=float, default=600, help="seconds a run may take (600)")
    add("--retry", action="store_true", help="run the cells again that failed before")
    add("--output", type=Path, default=Path("scaling_study"), help="folder, on storage that all nodes see")
    return parser


def main(description: str | None, argv: Sequence[str] | None = None) -> int:
    """Run the cells that have no row yet; then predict, report and draw.

    Returns:
        0; 1 when the table has cells that failed; 2 for settings that cannot be used.
    """
    args = make_parser(description).parse_args(argv)
    with ExitStack() as held:
        try:
            cells = make_grid(grid_of(args))
            runner = runner_of(args)
            args.output = args.output.absolute()
            args.output.mkdir(parents=True, exist_ok=True)
            held.enter_context(alone_in(args.output))
            rows = read_rows(args.output / TABLE)
            todo = left_to_do(cells, rows, args.retry)
            for nodes in {cell.nodes for cell in todo}:
                most = max(cell.ranks for cell in todo if cell.nodes == nodes) // nodes
                runner.check(nodes, most, args.output)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return run(args, cells, todo, rows, runner)


def grid_of(args: argparse.Namespace) -> Grid:
    """Return the grid that was asked for.

    Raises:
        ValueError: when a list names something twice.
    """
    for name in ("methods", "stages", "ranks", "nodes", "scaling"):
        twice = [value for value, count in Counter(getattr(args, name)).items() if count > 1]
        if twice:
            raise ValueError(f"--{name}: {twice[0]} is there twice")
    sizes = Sizes(**{field.name: getattr(args, field.name) for field in fields(Sizes)})
    given: Record = {field.name: getattr(args, field.name, None) for field in fields(Grid)}
    return Grid(**given | {"sizes": sizes, "link": args.link_name, "gbit": args.link_gbit})


def runner_of(args: argparse.Namespace) -> Runner:
    """Return where the cells run.

    Raises:
        ValueError: when the hostfile cannot be used.
    """
    if args.launcher == "hostfile":
        return Hosts(args.hostfile)
    return Local() if args.launcher == "local" else Slurm(shlex.split(args.sbatch), args.queue_limit)


def run(args: argparse.Namespace, cells: list[Cell], todo: list[Cell], rows: list[Row], runner: Runner) -> int:
    """Run what is left to do; write the table after each cell, and all the rest at the end."""
    print(f"{len(cells)} cells, of which {len(cells) - len(todo)} are done", flush=True)
    for number, cell in enumerate(todo, 1):
        print(f"[{number}/{len(todo)}] {cell}", end=": ", flush=True)
        row = measure(args, cell, runner)
        rows = with_row(rows, row)
        write_rows(args.output / TABLE, rows)
        print(f"{row['step_seconds']:.4g} s a step" if row["status"] == OK else f"failed: {row['error']}", flush=True)
    add_predictions(rows, lambda text: print(text, file=sys.stderr))
    write_rows(args.output / TABLE, rows)
    pictures = draw_all(args.output, rows)
    write_report(args.output / REPORT, rows, pictures)
    print(f"written to {args.output}: {', '.join([TABLE, REPORT, *pictures])}")
    return 1 if any(row["status"] == FAILED for row in rows) else 0


def measure(args: argparse.Namespace, cell: Cell, runner: Runner) -> Row:
    """Run one cell and return its row; the folder of a run that failed stays, with the logs of its ranks."""
    interface = args.interface or ("lo" if args.launcher == "local" else "eth0")
    environment = environment_of(args.device, interface, args.threads)
    job = Job(cell, args.device, interface, args.threads, args.limit, environment)
    folder = args.output / "runs" / cell.name
    row = row_of(cell) | {"launcher": args.launcher, "threads_per_rank": args.threads}
    try:
        row |= measured(run_job(runner, job, folder))
    except CellError as error:
        return row | {"status": FAILED, "error": str(error)}
    shutil.rmtree(folder)
    return row


def measured(result: Record) -> Row:
    """Return the columns of a row that a run fills."""
    seconds = result["seconds"]
    return {
        "status": OK,
        "step_seconds": statistics.median(seconds),
        "step_seconds_min": min(seconds),
        "step_seconds_max": max(seconds),
        **dict(zip(PHASES, result.get("phases", ()), strict=False)),
        "wire_bytes_sent": result["wire_sent"],
        "wire_bytes_received": result["wire_received"],
        "trained_parameters": result.get("trained"),
        **{name: result.get(name) for name in ("logical_bytes", "ring_bytes", "peak_bytes", "measured_gbit")},
        "refresh_seconds": result.get("refresh_seconds"),
        "refresh_wire_bytes": result.get("refresh_wire"),
        "device": result["device"],
        "load_average": result["load_average"],
        "cpu": result["hardware"]["cpu"],
        "cores": result["hardware"]["cores"],
        **result["versions"],
        "date": result["date"],
    }
