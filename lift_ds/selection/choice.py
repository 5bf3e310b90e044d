"""Which solver `auto` takes for a matrix."""

from __future__ import annotations

#: Shorter side from which "chebyshev", from an earlier subspace as in every refresh, is faster than "gram": in units of
#: r and at least, by type of device. Measured on the CPU, for r = 16 to 128, by
#: `benchmarks/refresh.py --shapes 384x1024 512x1360 768x2048 --lra_rank 64 --threads 1`; the others take its numbers.
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
