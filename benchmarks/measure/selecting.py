"""The ways to select that benchmarks/refresh.py compares, each run, timed and counted on one matrix.

    method            what runs
    baseline          torch.linalg.svd of the whole matrix in float32, W' formed whole, torch.topk of its magnitudes
    gram              lift_ds, eigenvectors of the smaller Gram matrix
    chebyshev cold    lift_ds, filtered subspace iteration from random vectors
    chebyshev warm    the same from the subspace of the matrix as it was a refresh ago
    svd_lowrank       torch.svd_lowrank as it is usually called: 2r columns, 2 iterations; then as the baseline

All select in the matrix as it is now, which differs from that of a refresh ago in its principal entries alone, by noise
of such a size that about a tenth of the selection changes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from benchmarks.measure.counting import allocated_peak
from benchmarks.measure.records import Record
from benchmarks.measure.spectra import perturbed
from lift_ds.selection import SelectionSettings, principal_indices, select_principal

#: Churn that a matrix is perturbed to have, and the range that will do.
_CHURN, _CHURN_RANGE = 0.1, (0.05, 0.2)

#: Up to this smaller side the exact selection is by singular values in float64, beyond by the Gram matrix in float64:
#: in a fifth of the time the same subspace to 1e-8, where the first r singular values lie within a factor of 10,000.
_SVD_SIDE = 1024


@dataclass(frozen=True)
class Outcome:
    """What one selection gave.

    Attributes:
        index: int64 [k], ascending.
        estimate: share of it that the solver expects to be wrong; None of one that has no idea.
        ran: the solver that really ran.
        rounds: of it.
        products: of it with the matrix.
    """

    index: Tensor
    estimate: float | None = None
    ran: str = "-"
    rounds: int = 0
    products: int = 0


@dataclass(frozen=True)
class Subject:
    """One matrix to select in.

    Attributes:
        name: of its kind, or of the parameter it was.
        weight: [m, n], as it is now.
        k: entries to select.
        lra_rank: r.
        determined: whether the exact selection is a single one.
        exact: int64 [k], that selection; None where it is not wanted.
        start: subspace of the matrix a refresh ago.
        churn: of the refresh.
    """

    name: str
    weight: Tensor
    k: int
    lra_rank: int
    determined: bool = True
    exact: Tensor | None = None
    start: Tensor | None = None
    churn: float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return (self.weight.shape[0], self.weight.shape[1])


@dataclass
class Measured:
    """What was found of one method on one subject."""

    outcome: Outcome
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None


def baseline(subject: Subject) -> Outcome:
    """Select as the definition reads, with nothing but torch."""
    u, s, vh = torch.linalg.svd(subject.weight.float(), full_matrices=False)
    rank = subject.lra_rank
    return Outcome(_largest((u[:, :rank] * s[:rank]) @ vh[:rank], subject.k), ran="svd")


def svd_lowrank(subject: Subject) -> Outcome:
    """Select with torch's randomised decomposition."""
    rank = subject.lra_rank
    u, s, v = torch.svd_lowrank(subject.weight.float(), q=min(2 * rank, min(subject.shape)), niter=2)
    return Outcome(_largest((u[:, :rank] * s[:rank]) @ v[:, :rank].T, subject.k), ran="svd_lowrank")


def _largest(approximation: Tensor, k: int) -> Tensor:
    return torch.topk(approximation.abs().view(-1), k, sorted=False).indices.sort().values


def by_solver(solver: str, *, warm: bool = False) -> Callable[[Subject], Outcome]:
    """Return the method that selects by one of the package's solvers.

    Args:
        solver: "svd", "gram" or "chebyshev".
        warm: whether from the subspace of a refresh ago.
    """

    def run(subject: Subject) -> Outcome:
        start = subject.start if warm else None
        settings = SelectionSettings(subject.k, subject.lra_rank, solver)
        found = select_principal(subject.weight, settings, start)
        return Outcome(found.index, found.estimate, found.solver or "-", found.rounds, found.products)

    return run


METHODS: dict[str, Callable[[Subject], Outcome]] = {
    "baseline": baseline,
    "gram": by_solver("gram"),
    "chebyshev cold": by_solver("chebyshev"),
    "chebyshev warm": by_solver("chebyshev", warm=True),
    "svd_lowrank": svd_lowrank,
}
#: With the solver that is the definition, for machines on which it takes no minutes.
ALL_METHODS = {**METHODS, "svd": by_solver("svd")}
#: Those of the package, which the budgets are about.
OWN = ("gram", "chebyshev cold", "chebyshev warm")


def subject_of(
    name: str, weight: Tensor, k: int, lra_rank: int, *, determined: bool = True, exact: bool = True
) -> Subject:
    """Make a subject of a matrix: perturb it, and find out what each method is given and compared with.

    Args:
        name: of the matrix.
        weight: [m, n], as it was a refresh ago.
        k: entries to select.
        lra_rank: r, below min(m, n).
        determined: whether the exact selection is a single one.
        exact: whether to find it.
    """
    before = select_principal(weight, SelectionSettings(k, lra_rank, "chebyshev"))
    now, churn = _trained(weight, before.index, k, lra_rank)
    selection = exact_selection(now, k, lra_rank) if exact else None
    return Subject(name, now, k, lra_rank, determined, selection, before.subspace, churn)


def _trained(weight: Tensor, index: Tensor, k: int, lra_rank: int) -> tuple[Tensor, float]:
    """Return the matrix a refresh later and the churn; the size of the changes is found by trying."""
    size = 0.3
    for _ in range(4):
        now = perturbed(weight, index, size)
        churn = 1 - overlap(index, principal_indices(now, k=k, lra_rank=lra_rank, solver="chebyshev"))
        if _CHURN_RANGE[0] <= churn <= _CHURN_RANGE[1]:
            break
        size *= min(5.0, _CHURN / max(churn, 1e-3))
    return now, churn


def exact_selection(weight: Tensor, k: int, lra_rank: int) -> Tensor:
    """Return the selection computed in float64, int64 [k]."""
    solver = "svd" if min(weight.shape) <= _SVD_SIDE else "gram"
    return principal_indices(weight.double(), k=k, lra_rank=lra_rank, solver=solver)


def overlap(one: Tensor, other: Tensor) -> float:
    """Return the share of one selection that is in another of as many entries."""
    return torch.isin(one, other, assume_unique=True).float().mean().item()


def measure(subject: Subject, methods: Sequence[str], rounds: int, *, memory: bool) -> dict[str, Measured]:
    """Run every method on one subject, in turns.

    Args:
        subject: the matrix.
        methods: of `ALL_METHODS`.
        rounds: timed runs of each, at least 1; all give the same selection.
        memory: whether to count the peak, in one run more.
    """
    device = subject.weight.device
    runs = {name: partial(ALL_METHODS[name], subject) for name in methods}
    peaks = {name: peak_beside(run, device) if memory else None for name, run in runs.items()}
    found: dict[str, Measured] = {}
    for _ in range(rounds):
        for name, run in runs.items():
            outcome, seconds = timed(run, device)
            found.setdefault(name, Measured(outcome, peak_bytes=peaks[name])).seconds.append(seconds)
    return found


def timed(action: Callable[[], Outcome], device: torch.device) -> tuple[Outcome, float]:
    """Return what an action gives and the seconds it takes, on a GPU until it is done there."""
    _wait_for(device)
    start = time.perf_counter()
    outcome = action()
    _wait_for(device)
    return outcome, time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_beside(action: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes that torch's allocator held at a time beyond what it held before."""
    if device.type != "cuda":
        return allocated_peak(action)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    action()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def record(subject: Subject, method: str, measured: Measured) -> Record:
    """Put what was found into plain JSON values."""
    outcome = measured.outcome
    return {
        "matrix": subject.name,
        "shape": list(subject.shape),
        "dtype": str(subject.weight.dtype).removeprefix("torch."),
        "lra_rank": subject.lra_rank,
        "k": subject.k,
        "determined": subject.determined,
        "churn": subject.churn,
        "method": method,
        "ran": outcome.ran,
        "seconds": statistics.median(measured.seconds) if measured.seconds else None,
        "all_seconds": measured.seconds,
        "peak_bytes": measured.peak_bytes,
        "overlap": None if subject.exact is None else overlap(outcome.index, subject.exact),
        "estimate": outcome.estimate,
        "rounds": outcome.rounds,
        "products": outcome.products,
    }
