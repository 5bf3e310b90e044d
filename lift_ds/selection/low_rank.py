"""Low-rank approximation W' of a weight matrix (equation 1 of the paper)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lift_ds.selection.tiles import tiles

#: Two factors [m, r] and [r, n] whose product is W'.
Factors = tuple[Tensor, Tensor]


def svd(weight: Tensor, rank: int) -> Factors:
    """The definition: W' = U_r S_r V_rᵀ from the full singular value decomposition.

    Args:
        weight: [m, n], any floating dtype.
        rank: r, below min(m, n).

    Returns:
        U_r S_r [m, r] and V_rᵀ [r, n].
    """
    u, s, vh = torch.linalg.svd(working_precision(weight), full_matrices=False)
    return u[:, :rank] * s[:rank], vh[:rank]


def gram(weight: Tensor, rank: int) -> Factors:
    """The same W' from the eigenvectors of the smaller of W Wᵀ and Wᵀ W.

    Squaring the singular values costs half of the digits, which the *subspace* of the r largest survives:
    W' = U_r (U_rᵀ W) needs no small singular value and no division.

    Args:
        weight: [m, n], any floating dtype; worked through in tiles, so that no float32 copy of it is made.
        rank: r, below min(m, n).

    Returns:
        For m <= n U_r [m, r] and U_rᵀ W [r, n], else W V_r [m, r] and V_rᵀ [r, n].
    """
    rows, columns = weight.shape
    if rows > columns:
        left, right = gram(weight.T, rank)
        return right.T, left.T
    u = _leading_eigenvectors(_outer_gram(weight), rank)  # [m, r]
    parts = [u.T @ working_precision(weight[:, tile]) for tile in tiles(columns, rows)]
    return u, torch.cat(parts, dim=1)


def _outer_gram(weight: Tensor) -> Tensor:
    """Return W Wᵀ [m, m] in working precision."""
    rows, columns = weight.shape
    total: Tensor | None = None
    for tile in tiles(columns, rows):
        part = working_precision(weight[:, tile])
        total = part @ part.T if total is None else total.addmm_(part, part.T)
    assert total is not None, "a matrix has columns"
    return total


def _leading_eigenvectors(matrix: Tensor, rank: int) -> Tensor:
    return torch.linalg.eigh(matrix).eigenvectors[:, -rank:]  # eigenvalues come ascending


_SOLVERS: dict[str, Callable[[Tensor, int], Factors]] = {"svd": svd, "gram": gram, "auto": gram}


def low_rank_factors(weight: Tensor, rank: int, solver: str) -> Factors | None:
    """Factor the best rank-r approximation W' of a matrix.

    Args:
        weight: [m, n], any floating dtype; computed in float32 (float64 stays).
        rank: r.
        solver: one of `lift_ds.config.SOLVERS`.

    Returns:
        Two factors [m, r] and [r, n] whose product is W', or None where r >= min(m, n): there W' = W.
    """
    if rank >= min(weight.shape):
        return None
    return _SOLVERS[solver](weight, rank)


def working_precision(weight: Tensor) -> Tensor:
    """Return the matrix in the dtype selections are computed in: float64 stays, all else becomes float32."""
    return weight if weight.dtype == torch.float64 else weight.float()
