"""What a selection costs, and which solver "auto" takes."""

from __future__ import annotations

import math

#: Leading terms of the usual operation counts, s the shorter and l the longer side: symmetric eigendecomposition with
#: vectors 9 s³, thin singular value decomposition with both factors 6 s² l + 20 s³. Not fitted to any machine.
_EIGH, _SVD_LONG, _SVD_SHORT = 9, 6, 20

#: Products of the Gram matrix with a block of 3/2 r vectors that "chebyshev" takes; between 4 and 25 were seen.
_PRODUCTS = 12

#: Forming abs(W') and ranking it, per entry, in units of one operation of a matrix product; a guess.
_RANKING = 50

#: Shorter side from which "chebyshev", from an earlier subspace as in every refresh, is faster than "gram": in units of
#: r and at least, by type of device. Measured on the CPU, for r = 16 to 128, by `python -m
#: benchmarks.refresh --shapes 384x1024 512x1360 768x2048 --lra_rank 64 --threads 1`; others take its numbers.
_CROSSOVER = {"cpu": (6, 512)}


def choose_solver(rows: int, columns: int, lra_rank: int, device_type: str) -> str:
    """Return the solver that is faster for a matrix of that shape, by measurement.

    Args:
        rows: m.
        columns: n.
        lra_rank: r.
        device_type: "cpu", "cuda", ...

    Returns:
        "gram" or "chebyshev".
    """
    ranks, least = _CROSSOVER.get(device_type, _CROSSOVER["cpu"])
    return "chebyshev" if min(rows, columns) >= max(ranks * lra_rank, least) else "gram"


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


def most_matrices(matrices: int, ranks: int) -> int:
    """Return how many matrices a rank may select in: one more than in equal shares.

    The ranks work in rounds of a matrix each, so many small ones on one rank would keep the others waiting.
    """
    return math.ceil(matrices / ranks) + 1
