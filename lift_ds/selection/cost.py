"""What a selection costs, and who does which: the largest matrices are dealt out first."""

from __future__ import annotations

from collections.abc import Sequence

#: Leading terms of the usual operation counts, s the shorter and l the longer side: symmetric eigendecomposition with
#: vectors 9 s³, thin singular value decomposition with both factors 6 s² l + 20 s³. Not fitted to any machine.
_EIGH, _SVD_LONG, _SVD_SHORT = 9, 6, 20

#: Products of the Gram matrix with a block of 3/2 r vectors that "chebyshev" takes; between 4 and 25 were seen.
_PRODUCTS = 12

#: Forming abs(W') and ranking it, per entry, in units of one operation of a matrix product; a guess.
_RANKING = 50


def selection_cost(rows: int, columns: int, lra_rank: int, solver: str) -> int:
    """Estimate the operations of selecting in one matrix; only the ratio between matrices matters.

    Args:
        rows: m.
        columns: n.
        lra_rank: r.
        solver: "svd", "gram" or "chebyshev".
    """
    short, long = sorted((rows, columns))
    ranking = _RANKING * rows * columns
    if lra_rank >= short:
        return ranking
    if solver == "svd":
        factors = _SVD_LONG * short**2 * long + _SVD_SHORT * short**3
    else:
        vectors = _EIGH * short**3 if solver == "gram" else 3 * _PRODUCTS * lra_rank * short**2
        factors = short**2 * long + vectors + 2 * lra_rank * rows * columns
    return factors + 2 * lra_rank * rows * columns + ranking


def deal_out(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Assign jobs to ranks, longest first, each to the rank with the least to do so far.

    The result depends on the arguments alone, so every rank finds the same.

    Args:
        costs: of the jobs.
        ranks: how many.

    Returns:
        For each rank the numbers of its jobs, longest first. No rank has more than its share plus one job.
    """
    loads = [0] * ranks
    jobs: list[list[int]] = [[] for _ in range(ranks)]
    for job in sorted(range(len(costs)), key=lambda job: (-costs[job], job)):
        rank = min(range(ranks), key=lambda rank: (loads[rank], rank))
        loads[rank] += costs[job]
        jobs[rank].append(job)
    return jobs
