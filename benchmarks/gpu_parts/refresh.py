"""Part `refresh`: seconds, memory and exactness of selecting principal weights on this device.

    matrix      the solvers on one matrix with the spectrum of a trained one; off the selection of float64; peak memory
                beside the estimate by which training keeps `refresh_memory_gib`
    svd         the same by the full singular value decomposition, once
    crossover   from which size on "chebyshev" is faster than "gram", for several ranks
    round       all matrices of Llama-2-7B, one after the other, the first time and from the subspaces of a refresh ago

Matrices are in bf16; at r = 128, 5% of the entries are selected.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks.gpu_parts.cells import Batch, Cell, SkippedError
from benchmarks.measure.records import Record, judged
from benchmarks.measure.selecting import (
    ALL_METHODS,
    OWN,
    Measured,
    Outcome,
    Subject,
    measure,
    peak_beside,
    record,
    subject_of,
    timed,
)
from benchmarks.measure.spectra import matrix
from benchmarks.refresh import MODELS, table
from lift_ds.selection import MatrixSize, SelectionSettings
from lift_ds.selection.memory import selection_memory

IMPORTS = ("deepspeed",)

#: A kind of `spectra.SPECTRA`: a bulk, a slowly falling law above it, outlier rows and columns.
_KIND = "trained-like"
_DENSITY = 0.05

#: Goals: seconds of the full SVD over those of a refresh of the matrix, at least; seconds of a round of 7B; share off
#: the selection of float64.
FASTER, FASTER_SHAPE, ROUND_SECONDS, OFF = 100.0, [4096, 11008], 8.0, 0.005

#: Of an SVD, beyond which it is left out.
_SVD_SECONDS = 200.0


@dataclass(frozen=True)
class Sizes:
    """What is run.

    Args:
        shapes: [m, n] of the single matrices.
        lra_rank: r.
        rounds: timed runs of each method, by shape.
        crossover: rank -> shorter sides.
        model: (how many, rows, columns) of the matrices of a round.
        distinct: matrices of each shape that are made for it; they take turns.
    """

    shapes: tuple[tuple[int, int], ...]
    lra_rank: int
    rounds: tuple[int, ...]
    crossover: dict[int, tuple[int, ...]]
    model: tuple[tuple[int, int, int], ...]
    distinct: int


_SIDES = (256, 384, 512, 768, 1024, 1536, 2048)
_FULL = Sizes(
    shapes=((4096, 4096), (4096, 11008), (8192, 28672)),
    lra_rank=128,
    rounds=(3, 3, 1),
    crossover={rank: tuple(side for side in _SIDES if side >= 3 * rank) for rank in (16, 32, 64, 128)},
    model=MODELS["llama-2-7b"],
    distinct=4,
)
_SMALL = Sizes(
    shapes=((64, 64), (64, 172), (64, 344)),
    lra_rank=8,
    rounds=(1, 1, 1),
    crossover={4: (24, 48), 8: (48,)},
    model=((4, 64, 64), (2, 172, 64), (1, 64, 172)),
    distinct=2,
)


def batches(device: str, small: bool) -> list[Batch]:
    """Return the cells; the SVD of the largest matrix comes last, it takes longest."""
    sizes = _SMALL if small else _FULL
    rank = sizes.lra_rank
    first = [
        Cell(f"matrix {m} x {n}", measure_matrix, (m, n, rank, rounds), expected=60.0, limit=240.0)
        for (m, n), rounds in zip(sizes.shapes, sizes.rounds, strict=True)
    ]
    first.append(Cell("round", measure_round, (sizes.model, rank, sizes.distinct), expected=90.0, limit=300.0))
    first += [
        Cell(f"crossover, rank {rank}", measure_crossover, (rank, sides), expected=30.0)
        for rank, sides in sizes.crossover.items()
    ]
    svds = [Cell(f"svd {m} x {n}", measure_svd, (m, n, rank), 90.0, 240.0) for m, n in sizes.shapes[:2]]
    svds += [Cell(f"svd {m} x {n}", measure_large_svd, (m, n, rank), 300.0, 420.0) for m, n in sizes.shapes[2:]]
    return [Batch(first), Batch(svds)]


def measure_matrix(device: str, rows: int, columns: int, rank: int, rounds: int) -> Record:
    """Run the package's fast solvers on one matrix."""
    subject = _subject(device, rows, columns, rank)
    found = measure(subject, OWN, rounds, memory=True)
    return {"records": [_with_estimate(record(subject, name, measured)) for name, measured in found.items()]}


def measure_svd(device: str, rows: int, columns: int, rank: int) -> Record:
    """Run the solver that is the definition on one matrix, once."""
    subject = _subject(device, rows, columns, rank)
    _warm_up(device)
    outcomes: list[tuple[Outcome, float]] = []
    run = ALL_METHODS["svd"]
    peak = peak_beside(
        lambda: outcomes.append(timed(lambda: run(subject), subject.weight.device)), subject.weight.device
    )
    ((outcome, seconds),) = outcomes
    return {"records": [_with_estimate(record(subject, "svd", Measured(outcome, [seconds], peak)))]}


def measure_large_svd(device: str, rows: int, columns: int, rank: int) -> Record:
    """The same where a matrix of half the sides says that there is time for it."""
    expected = 8 * _svd_seconds(device, rows // 2, columns // 2)
    if expected > _SVD_SECONDS:
        raise SkippedError(f"it would take about {expected:.0f} s, by a matrix of half the sides")
    return measure_svd(device, rows, columns, rank)


def _svd_seconds(device: str, rows: int, columns: int) -> float:
    _warm_up(device)
    weight = torch.randn(rows, columns, device=device)
    return timed(lambda: Outcome(torch.linalg.svd(weight, full_matrices=False)[1]), weight.device)[1]


def _subject(device: str, rows: int, columns: int, rank: int, *, seed: int = 0, exact: bool = True) -> Subject:
    weight = matrix(_KIND, rows, columns, rank, seed=seed, dtype=torch.bfloat16, device=device)
    return subject_of(_KIND, weight, round(_DENSITY * rows * columns), rank, exact=exact)


def _warm_up(device: str) -> None:
    """Let the libraries of linear algebra set themselves up."""
    torch.linalg.svd(torch.randn(64, 64, device=device))


def _with_estimate(found: Record) -> Record:
    rows, columns = found["shape"]
    settings = SelectionSettings(found["k"], found["lra_rank"], found["method"].partition(" ")[0])
    return {**found, "estimated_bytes": selection_memory(MatrixSize(rows, columns, 2), settings)}


def measure_crossover(device: str, rank: int, sides: Sequence[int]) -> Record:
    """Time "gram" and "chebyshev", from an earlier subspace, on matrices of one rank and several sizes."""
    times = []
    for side in sides:
        subject = _subject(device, side, round(side * 8 / 3), rank, exact=False)
        found = measure(subject, ("gram", "chebyshev warm"), 6, memory=False)
        gram, chebyshev = (statistics.median(measured.seconds[1:]) for measured in found.values())
        times.append({"rank": rank, "side": side, "gram": gram, "chebyshev": chebyshev})
    return {"times": times}


def measure_round(device: str, model: Sequence[tuple[int, int, int]], rank: int, distinct: int) -> Record:
    """Select in as many matrices as a model has, one after the other.

    Args:
        device: "cuda" or "cpu".
        model: (how many, rows, columns).
        rank: r.
        distinct: matrices of each shape that are made, and take turns.
    """
    subjects = {
        (rows, columns): [_subject(device, rows, columns, rank, seed=seed, exact=False) for seed in range(distinct)]
        for _, rows, columns in model
    }
    found: Record = {"matrices": sum(count for count, *_ in model), "distinct": distinct}
    for method in ("chebyshev cold", "chebyshev warm"):
        ran: Counter[str] = Counter()
        by_shape = {}
        for count, rows, columns in model:
            seconds = []
            for subject in _in_turns(subjects[rows, columns], count):
                outcome, spent = timed(lambda run=ALL_METHODS[method], s=subject: run(s), subject.weight.device)  # type: ignore[misc]
                seconds.append(spent)
                ran[outcome.ran] += 1
            by_shape[f"{rows} x {columns}"] = {"seconds": sum(seconds), "slowest": max(seconds), "count": count}
        total = sum(entry["seconds"] for entry in by_shape.values())
        found[method] = {"seconds": total, "by_shape": by_shape, "ran": dict(ran)}
    return found


def _in_turns(subjects: Sequence[Subject], count: int) -> Iterator[Subject]:
    return (subjects[number % len(subjects)] for number in range(count))


def fit(times: Iterable[Record]) -> tuple[int, int] | None:
    """Return the sizes from which "chebyshev" is to be taken, as `lift_ds.selection.cost` has them.

    Args:
        times: seconds of both solvers by rank and shorter side.

    Returns:
        (n, least): where the shorter side is at least max(n r, least). Of all such pairs the one with which the solver
        that is taken is slower than the other by least, in the mean of the ratios; None without times.
    """
    times = list(times)
    if not times:
        return None
    sides = sorted({entry["side"] for entry in times})

    def loss(pair: tuple[int, int]) -> float:
        chosen = (
            entry["chebyshev" if entry["side"] >= max(pair[0] * entry["rank"], pair[1]) else "gram"]
            / min(entry["gram"], entry["chebyshev"])
            for entry in times
        )
        return sum(math.log(ratio) for ratio in chosen)

    return min(((ranks, least) for ranks in range(1, 33) for least in (*sides, 2 * sides[-1])), key=loss)


def _records(cells: dict[str, Record]) -> list[Record]:
    return [found for entry in cells.values() for found in entry.get("records", ())]


def _times(cells: dict[str, Record]) -> list[Record]:
    return [found for entry in cells.values() for found in entry.get("times", ())]


def conclude(cells: dict[str, Record]) -> Record:
    """Return the crossover."""
    return {"crossover": fit(_times(cells))}


def report(cells: dict[str, Record], *, measured: bool) -> str:
    """Return the tables, and what follows from them where they are of a device."""
    records = sorted(_records(cells), key=lambda r: r["shape"])
    rows = [table(records, head=True)] if records else []
    rows += [
        f"{'x'.join(map(str, r['shape']))}, {r['method']}: {r['peak_bytes'] / 1e6:.0f} MB beside the matrix, "
        f"estimated {r['estimated_bytes'] / 1e6:.0f}"
        for r in records
        if r["peak_bytes"] is not None
    ]
    rows += [
        f"rank {t['rank']:4}  side {t['side']:5}  "
        f"gram {1e3 * t['gram']:8.2f} ms  chebyshev {1e3 * t['chebyshev']:8.2f} ms"
        for t in _times(cells)
    ]
    if measured and (pair := fit(_times(cells))):
        rows.append(f'sizes for lift_ds/selection/cost.py: _CROSSOVER["cuda"] = ({pair[0]}, {pair[1]})')
    if cells.get("round", {}).get("chebyshev warm"):
        entry = cells["round"]
        rows += [
            f"{entry['matrices']} matrices, {method}: {entry[method]['seconds']:.2f} s, by {entry[method]['ran']}"
            for method in ("chebyshev cold", "chebyshev warm")
        ]
    return "\n".join(rows)


def budgets(cells: dict[str, Record]) -> list[Record]:
    """Judge speed, exactness and memory."""
    found = []
    records = _records(cells)
    svd = {tuple(r["shape"]): r["seconds"] for r in records if r["method"] == "svd"}
    for r in records:
        where = f"{r['method']}, {'x'.join(map(str, r['shape']))}"
        if r["method"] == "chebyshev warm" and r["shape"] == FASTER_SHAPE and tuple(r["shape"]) in svd:
            ratio = svd[tuple(r["shape"])] / r["seconds"]
            found.append(judged("times faster than the full SVD, at least", where, ratio, FASTER, least=True))
        if r["overlap"] is not None:
            found.append(judged("off the selection of float64, at most", where, 1 - r["overlap"], OFF))
        if r["peak_bytes"] is not None:
            ratio = r["peak_bytes"] / r["estimated_bytes"]
            found.append(judged("peak beside the estimate, at most", where, ratio, 1.0))
    if "chebyshev warm" in cells.get("round", {}):
        seconds = cells["round"]["chebyshev warm"]["seconds"]
        found.append(judged("seconds of a round, at most", "llama-2-7b", seconds, ROUND_SECONDS))
    return found
