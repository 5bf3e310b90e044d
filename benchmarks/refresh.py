"""What selecting the principal weights of a matrix takes: time, memory, and how near it comes to the exact selection.

    python -m benchmarks.refresh                                            # table, JSON and plot; some minutes
    python -m benchmarks.refresh --matrices all --shapes 1024x2816          # every kind of matrix of measure/spectra.py
    python -m benchmarks.refresh --weights lift_output                      # the matrices of a saved model
    python -m benchmarks.refresh --device cuda --model llama-2-7b --whole   # a refresh of all matrices of a model
    python -m benchmarks.refresh --largest                                  # memory of one 8192 x 28672 matrix

The methods are described in measure/selecting.py. They run in turns in one process, and medians are compared: what else
runs on the machine falls on all of them. Memory is what torch's allocator held at a time beside the matrix (on a GPU
torch.cuda.max_memory_allocated; on a CPU the same from the events of the allocator). "off" is the share of
the selection that is not in the exact one, computed in float64; "estimated" what the solver itself expects of it.

Exit code 1 when a budget is exceeded. The budgets on time are those of trained-like matrices on two cores; the ones on
the selection hold for every matrix whose exact selection is a single one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks.measure.plots import save_svg
from benchmarks.measure.records import RESULTS, Record, exit_code, judged, print_budgets, surroundings, write_json
from benchmarks.measure.selecting import (
    METHODS,
    OWN,
    Measured,
    Outcome,
    Subject,
    measure,
    peak_beside,
    record,
    subject_of,
)
from benchmarks.measure.spectra import SPECTRA, matrix

#: Kinds of matrices that are run where none are named; the first is the one whose times count.
_MATRICES = ("trained-like", "power 0.6", "power 0.4", "gaussian")
#: The kind, the shape and the rank of which the budgets on time speak.
_TIMED = ("trained-like", (2048, 5504), 128)
#: The largest matrix of the models in use.
_LARGEST = (8192, 28672)
#: Baseline's seconds over those of a method, at least; share off the exact selection, at most; the same beyond the
#: estimate; bytes beside the largest matrix.
_FASTER, _OFF, _DISHONEST, _LARGEST_BYTES = {"chebyshev cold": 8.0, "chebyshev warm": 12.0}, 0.005, 0.005, 1.5e9

#: A selection that is exact has no place on a logarithmic axis: it is drawn here.
_LEAST = 1e-6

_COLOURS = {
    "baseline": "#7f7f7f",
    "svd_lowrank": "#d62728",
    "gram": "#1f77b4",
    "chebyshev cold": "#2ca02c",
    "chebyshev warm": "#ff7f0e",
}

#: Model -> (how many, rows, columns) of its managed matrices.
MODELS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "llama-2-7b": ((128, 4096, 4096), (64, 11008, 4096), (32, 4096, 11008)),
    "llama-2-13b": ((160, 5120, 5120), (80, 13824, 5120), (40, 5120, 13824)),
    "llama-3-8b": ((64, 4096, 4096), (64, 1024, 4096), (64, 14336, 4096), (32, 4096, 14336)),
    "llama-3-70b": ((160, 8192, 8192), (160, 1024, 8192), (160, 28672, 8192), (80, 8192, 28672)),
}


@dataclass(frozen=True)
class Given:
    """A matrix to run on, as it was a refresh ago, not yet made.

    Attributes:
        name: of its kind, or of the parameter.
        weight: [m, n]; None for a kind of `SPECTRA`.
        rows: m.
        columns: n.
    """

    name: str
    rows: int
    columns: int
    weight: Tensor | None = None

    def made(self, args: argparse.Namespace, seed: int = 0) -> Tensor:
        """Return the matrix, on the device asked for."""
        if self.weight is not None:
            return self.weight.to(args.device)
        dtype = getattr(torch, args.dtype)
        return matrix(self.name, self.rows, self.columns, args.lra_rank, seed=seed, dtype=dtype, device=args.device)

    def subject(self, args: argparse.Namespace, *, exact: bool = True) -> Subject:
        """Return the matrix ready to be run on."""
        kind = SPECTRA.get(self.name)
        determined = kind is None or kind.determined
        k = round(args.density * self.rows * self.columns)
        return subject_of(self.name, self.made(args), k, args.lra_rank, determined=determined, exact=exact)


def matrices(args: argparse.Namespace) -> Iterator[Given]:
    """Yield what to run on, shape by shape."""
    if args.weights:
        yield from saved_matrices(args.weights, args.lra_rank, args.limit)
        return
    for rows, columns in args.shapes:
        for name in args.matrices:
            yield Given(name, rows, columns)


def saved_matrices(path: Path, lra_rank: int, limit: int) -> Iterator[Given]:
    """Yield the matrices of a safetensors file, or of all those in a folder.

    Args:
        path: of the file or folder.
        lra_rank: r; a matrix whose smaller side is not above it is left out, as are embeddings and heads.
        limit: how many at most, spread evenly over the names.
    """
    found: list[tuple[Path, str]] = []
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # no mapping
                shape = tensors.get_slice(name).get_shape()
                if len(shape) == 2 and min(shape) > lra_rank and not ("embed" in name or "head" in name):
                    found.append((file, name))
    if not found:
        raise SystemExit(f"{path}: no matrix with both sides above lra_rank={lra_rank}; name a smaller --lra_rank")
    for file, name in found[:: max(1, -(-len(found) // limit))]:
        with safe_open(file, framework="pt") as tensors:
            weight = tensors.get_tensor(name)
        yield Given(name, weight.shape[0], weight.shape[1], weight)


def run_matrices(args: argparse.Namespace) -> list[Record]:
    """Run every method on every matrix; memory is counted on the first of each shape, and the others are run once."""
    records: list[Record] = []
    seen: set[tuple[int, int]] = set()
    for given in matrices(args):
        shape = (given.rows, given.columns)
        subject, first = given.subject(args), shape not in seen
        found = measure(subject, args.methods, args.rounds if first else 1, memory=first)
        seen.add(shape)
        new = [record(subject, name, measured) for name, measured in found.items()]
        print(table(new, head=not records), flush=True)
        records += new
    return records


def table(records: list[Record], *, head: bool) -> str:
    """Return a row per matrix and method."""
    slowest = {(r["matrix"], *r["shape"]): r["seconds"] for r in records if r["method"] in ("baseline", "svd")}
    rows = [
        f"{'matrix':24} {'shape':>11} {'churn':>5}  {'method':15} {'seconds':>8} {'faster':>6} {'MB':>7} "
        f"{'off':>8} {'estimated':>9} {'rounds':>6} {'products':>8}  ran"
    ] * head
    for r in records:
        of = slowest.get((r["matrix"], *r["shape"]))
        rows.append(
            f"{r['matrix'][-24:]:24} {_by_name(r['shape']):>11} {_cell(r['churn'], '5.2f')}  {r['method']:15} "
            f"{_cell(r['seconds'], '8.3f')} {_cell(of and of / r['seconds'], '6.1f')} "
            f"{_cell(r['peak_bytes'] and r['peak_bytes'] / 1e6, '7.0f')} "
            f"{_cell(None if r['overlap'] is None else 1 - r['overlap'], '8.5f')} {_cell(r['estimate'], '9.5f')} "
            f"{r['rounds']:6} {r['products']:8}  {r['ran']}"
        )
    return "\n".join(rows)


def of_shapes(records: list[Record]) -> list[Record]:
    """Gather the records of a model's matrices: for each shape and method all of them together."""
    found: dict[tuple[str, str], list[Record]] = {}
    for r in records:
        found.setdefault((_by_name(r["shape"]), r["method"]), []).append(r)
    return [
        {
            "shape": shape,
            "method": method,
            "matrices": len(own),
            "seconds": sum(r["seconds"] for r in own),
            "off, mean": 1 - statistics.mean(r["overlap"] for r in own),
            "off, at most": 1 - min(r["overlap"] for r in own),
            "fell back": sum(r["ran"] == "gram" for r in own) if "chebyshev" in method else 0,
        }
        for (shape, method), own in found.items()
    ]


def table_of_shapes(records: list[Record]) -> str:
    """Return a row per method over all matrices; times against the baseline's."""
    found: dict[str, list[Record]] = {}
    for r in records:
        found.setdefault(r["method"], []).append(r)
    slowest = sum(r["seconds"] for r in found.get("baseline", []))
    rows = [f"{'all matrices':15} {'seconds':>8} {'faster':>6} {'off, mean':>9} {'at most':>8} {'fell back':>9}"]
    for method, own in found.items():
        seconds, count = sum(r["seconds"] for r in own), sum(r["matrices"] for r in own)
        mean = sum(r["matrices"] * r["off, mean"] for r in own) / count
        rows.append(
            f"{method:15} {seconds:8.1f} {_cell(slowest / seconds if slowest else None, '6.2f')} {mean:9.5f} "
            f"{max(r['off, at most'] for r in own):8.5f} {sum(r['fell back'] for r in own):9}"
        )
    return "\n".join(rows)


def _by_name(shape: list[int]) -> str:
    return "x".join(map(str, shape))


def _cell(value: float | None, layout: str) -> str:
    return format(value, layout) if value is not None else "-".rjust(int(layout.partition(".")[0]))


def run_model(args: argparse.Namespace) -> list[Record]:
    """Time a refresh of all matrices of a model on one device: each shape once, times its count; whole, all of them."""
    methods = [name for name in args.methods if name in OWN or not args.whole]
    per_shape: list[tuple[int, dict[str, float]]] = []
    for count, rows, columns in MODELS[args.model]:
        given = Given(args.matrices[0], rows, columns)
        if args.whole:
            seconds = _all_of(given, count, methods, args)
        else:
            found = measure(given.subject(args, exact=False), methods, args.rounds, memory=False)
            seconds = {name: count * statistics.median(measured.seconds) for name, measured in found.items()}
        per_shape.append((count, seconds))
        print(f"{count:4} of {rows}x{columns}: " + ", ".join(f"{n} {s:.1f} s" for n, s in seconds.items()), flush=True)
    totals = {name: sum(seconds[name] for _, seconds in per_shape) for name in methods}
    print(f"{args.model}, all: " + ", ".join(f"{n} {s:.1f} s" for n, s in totals.items()))
    return [
        {"model": args.model, "method": name, "seconds": total, "whole": args.whole, "matrix": args.matrices[0]}
        for name, total in totals.items()
    ]


def _all_of(given: Given, count: int, methods: list[str], args: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of each method for so many different matrices of one shape, each in its turn."""
    totals = dict.fromkeys(methods, 0.0)
    k = round(args.density * given.rows * given.columns)
    for seed in range(count):
        subject = subject_of(given.name, given.made(args, seed), k, args.lra_rank, exact=False)
        for name, measured in measure(subject, methods, 1, memory=False).items():
            totals[name] += measured.seconds[0]
    return totals


def run_largest(args: argparse.Namespace) -> Record:
    """Count the memory of selecting in one matrix of the largest models, as its refresh would; one run, at rank 128."""
    (rows, columns), rank, method = _LARGEST, 128, "chebyshev cold"
    weight = matrix("trained-like", rows, columns, rank, dtype=torch.bfloat16, device=args.device)
    subject = Subject("trained-like", weight, rank * (rows + columns), rank)
    outcomes: list[Outcome] = []
    peak = peak_beside(lambda: outcomes.append(METHODS[method](subject)), weight.device)
    row = record(subject, method, Measured(outcomes[0], peak_bytes=peak))
    print(table([row], head=True))
    return row


def budgets(records: list[Record]) -> list[Record]:
    """Judge time, nearness and honesty where a record allows to."""
    found: list[Record] = []
    records = [r for r in records if "shape" in r]  # not those of a whole model
    baseline = {(r["matrix"], *r["shape"]): r["seconds"] for r in records if r["method"] == "baseline"}

    def judge(name: str, r: Record, value: float, limit: float, *, least: bool = False) -> None:
        where = f"{r['method']}, {r['matrix']} {_by_name(r['shape'])}"
        found.append(judged(name, where, value, limit, least=least))

    for r in records:
        if r["method"] not in OWN:
            continue
        slow = baseline.get((r["matrix"], *r["shape"]))
        if slow and (r["matrix"], tuple(r["shape"]), r["lra_rank"]) == _TIMED and r["method"] in _FASTER:
            judge("times faster than the baseline, at least", r, slow / r["seconds"], _FASTER[r["method"]], least=True)
        if r["overlap"] is not None and r["determined"]:
            judge("off the exact selection, at most", r, 1 - r["overlap"], _OFF)
            judge("off beyond the estimate, at most", r, 1 - r["overlap"] - r["estimate"], _DISHONEST)
        if r["shape"] == list(_LARGEST) and r["peak_bytes"] is not None:
            judge("bytes beside the matrix, at most", r, r["peak_bytes"], _LARGEST_BYTES)
    return found


def worst(found: list[Record]) -> list[Record]:
    """Return what to print of the budgets: every one that failed, and else the nearest to its limit by method."""
    nearest: dict[tuple[str, str], Record] = {}
    for entry in found:
        key = (entry["budget"], entry["where"].partition(",")[0])
        if key not in nearest or _room(entry) < _room(nearest[key]):
            nearest[key] = entry
    return [entry for entry in found if not entry["pass"] or any(entry is kept for kept in nearest.values())]


def _room(entry: Record) -> float:
    room = entry["limit"] - entry["value"]
    return -room if "at least" in entry["budget"] else room


def draw(records: list[Record], path: Path) -> None:
    """Draw seconds by shape and method, and the share off the exact selection by matrix.

    Args:
        records: as `selecting.record` makes them.
        path: of the file, .svg.
    """
    from matplotlib.figure import Figure  # here: the numbers do not need it

    records = [r for r in records if r["seconds"] is not None]  # of the largest matrix memory alone is counted
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _seconds(left, records)
    _off(right, records)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    save_svg(figure, path)


def _seconds(axes: Any, records: list[Record]) -> None:
    first = records[0]["matrix"]
    same = [r for r in records if r["matrix"] == first]
    shapes = list(dict.fromkeys(_by_name(r["shape"]) for r in same))
    _bars(axes, same, shapes, lambda r: _by_name(r["shape"]), lambda r: r["seconds"])
    axes.set(title=f"Selecting in one matrix ({_short(first)}, {records[0]['dtype']})", ylabel="seconds", yscale="log")


def _off(axes: Any, records: list[Record]) -> None:
    last = records[-1]["shape"]
    same = [r for r in records if r["overlap"] is not None and r["method"] != "baseline"]
    if len({r["matrix"] for r in same}) < len({(r["matrix"], *r["shape"]) for r in same}):
        same = [r for r in same if r["shape"] == last]
    names = list(dict.fromkeys(r["matrix"] for r in same))
    _bars(axes, same, names, lambda r: r["matrix"], lambda r: max(1 - r["overlap"], _LEAST))
    axes.axhline(0.005, color="black", linewidth=0.8, linestyle="--")
    axes.set(title="Share off the exact selection (dashed: budget)", yscale="log", ylim=(_LEAST / 2, 1))
    axes.set_xticks(range(len(names)), [_short(name) for name in names], rotation=30 if len(names) > 4 else 0)


def _bars(axes: Any, records: list[Record], groups: list[str], group_of: Any, value_of: Any) -> None:
    methods = [name for name in _COLOURS if any(r["method"] == name for r in records)]
    width = 0.8 / max(1, len(methods))
    for number, method in enumerate(methods):
        chosen = [r for r in records if r["method"] == method]
        places = [groups.index(group_of(r)) + (number - (len(methods) - 1) / 2) * width for r in chosen]
        axes.bar(places, [value_of(r) for r in chosen], width, label=method, color=_COLOURS[method])
    axes.set_xticks(range(len(groups)), groups)
    axes.spines[["top", "right"]].set_visible(False)


def _short(name: str) -> str:
    return ".".join(name.removesuffix(".weight").split(".")[-3:])


def _shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    return int(rows), int(columns)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=_shape, nargs="+", default=[(1024, 2816), (2048, 2048), (2048, 5504)])
    parser.add_argument("--matrices", nargs="+", choices=[*SPECTRA, "all"], default=list(_MATRICES))
    parser.add_argument("--weights", type=Path, help="safetensors file, or folder of a model, in place of the above")
    parser.add_argument("--limit", type=int, default=16, help="matrices of --weights, spread evenly")
    parser.add_argument("--model", choices=MODELS, help="time a refresh of all its matrices, with no other output")
    parser.add_argument("--whole", action="store_true", help="with --model: run every matrix, not one of each shape")
    parser.add_argument("--largest", action="store_true", help="count the memory of one 8192 x 28672 matrix as well")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lra_rank", type=int, default=128)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=3, help="timed runs on the first matrix of a shape")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one small shape and one round: does it run at all")
    parser.add_argument("--output", type=Path, default=RESULTS / "refresh.json", help="the plot goes beside it")
    args = parser.parse_args(arguments)
    if args.quick:
        args.shapes, args.lra_rank, args.rounds = [(192, 320)], 24, 1
    if "all" in args.matrices:
        args.matrices = list(SPECTRA)
    return args


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write the JSON and the plot; 1 when a budget is exceeded."""
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    records = run_model(args) if args.model else run_matrices(args)
    if args.largest:
        records.append(run_largest(args))
    print_budgets(worst(found := budgets(records)))
    on_gpu = {"gpu": torch.cuda.get_device_name(args.device)} if args.device.startswith("cuda") else {}
    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    given |= {"output": args.output.name, "weights": args.weights and args.weights.name}
    if args.weights:
        print(table_of_shapes(of_shapes(records)))
    # Other processes on the cores show in the times.
    around = surroundings(("safetensors",), threads=args.threads, **on_gpu) | {"load_average": os.getloadavg()}
    kept = {"records": records, "budgets": found}
    if args.weights:  # hundreds of matrices
        kept = {"records": of_shapes(records), "budgets": worst(found)}
    write_json(args.output, {**around, "arguments": given, **kept})
    if not args.model:
        draw(records, args.output.with_suffix(".svg"))
    return exit_code(found)


if __name__ == "__main__":
    sys.exit(main())
