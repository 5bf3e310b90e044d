"""Low-rank approximation W' of a weight matrix (equation 1 of the paper), by what is exact for the selection."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lift_ds.selection.precision import tiles, unit_scale, working_precision

#: Two factors [m, r] and [r, n] whose product is W'.
Factors = tuple[Tensor, Tensor]

#: Runs of rows in which a Gram matrix is formed: of its two equal halves only the one below the diagonal is computed.
_ROW_BLOCKS = 8
#: Error of W', relative to its norm, from which "gram" repeats in float64; about as much of a selection would change.
_ROUNDING = 3e-4


def svd(weight: Tensor, rank: int) -> Factors:
    """The definition: W' = U_r S_r V_rᵀ from the full singular value decomposition.

    Args:
        weight: [m, n], any floating dtype.
        rank: r, below min(m, n).

    Returns:
        U_r S_r [m, r] and V_rᵀ [r, n].
    """
    u, s, vh = torch.linalg.svd(working_precision(weight), full_matrices=False)
    return u[:, :rank] * s[:rank], vh[:rank].clone()  # a view would keep all of it


def gram(weight: Tensor, rank: int) -> Factors:
    """The same W' from the eigenvectors of the smaller of W Wᵀ and Wᵀ W.

    Squaring the singular values costs half of the digits, which the *subspace* of the r largest survives as a rule:
    W' = U_r (U_rᵀ W) needs no small singular value and no division. Where it does not, because λ_1 is large against the
    distance of λ_r from λ_{r+1}, it is computed again in float64.

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
    scale = unit_scale(weight)
    values, vectors = torch.linalg.eigh(outer_gram(weight, scale))  # ascending
    if rounding_error(values.flip(0), rank) > _ROUNDING:
        _, vectors = torch.linalg.eigh(outer_gram(weight, scale, torch.float64))
    return projected(weight, vectors[:, -rank:].to(values.dtype, copy=True))  # a view would keep all of them


def projected(weight: Tensor, basis: Tensor) -> Factors:
    """Return U and Uᵀ W, whose product is the part of W in the span of U.

    Args:
        weight: [m, n], any floating dtype; worked through in tiles.
        basis: U [m, r], orthonormal columns.
    """
    rows, columns = weight.shape
    parts = [basis.T @ working_precision(weight[:, tile]) for tile in tiles(columns, rows)]
    return basis, torch.cat(parts, dim=1)


def rounding_error(values: Tensor, rank: int) -> float:
    """Estimate the error of W', relative to its norm, that rounding of W Wᵀ in the dtype of its eigenvalues causes.

    Args:
        values: eigenvalues of W Wᵀ, descending.
        rank: r.
    """
    noise = torch.finfo(values.dtype).eps / 2 * values[0].abs()
    wanted, others = values[:rank, None], values[None, rank:]
    angles = (noise / (wanted - others).clamp_min(torch.finfo(values.dtype).tiny)).clamp_max(1.0)
    energy = (angles**2 * (wanted + others).clamp_min(0.0)).sum()
    return float((energy / wanted.clamp_min(0.0).sum().clamp_min(torch.finfo(values.dtype).tiny)).sqrt())


def outer_gram(weight: Tensor, scale: float, dtype: torch.dtype | None = None) -> Tensor:
    """Return (scale W) (scale W)ᵀ [m, m].

    Args:
        weight: [m, n], any floating dtype; worked through in tiles.
        scale: a power of two (`unit_scale`), so that no square leaves the range of the dtype.
        dtype: of the result and the sums; working precision if None.
    """
    dtype = dtype or working_precision(weight[:0]).dtype
    rows, columns = weight.shape
    total = weight.new_zeros(rows, rows, dtype=dtype)
    for tile in tiles(columns, rows):
        part = weight[:, tile].to(dtype) * scale
        for block in _row_blocks(rows):
            total[block, : block.stop].addmm_(part[block], part[: block.stop].T)
    for block in _row_blocks(rows):
        total[: block.start, block] = total[block, : block.start].T
    return total


def _row_blocks(rows: int) -> list[slice]:
    size = -(-rows // _ROW_BLOCKS)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


_EXACT_SOLVERS: dict[str, Callable[[Tensor, int], Factors]] = {"svd": svd, "gram": gram}


def low_rank_factors(weight: Tensor, rank: int, solver: str) -> Factors:
    """Factor the best rank-r approximation W' of a matrix by a solver that is exact for the selection.

    Args:
        weight: [m, n], any floating dtype; computed in float32 (float64 stays).
        rank: r, below min(m, n).
        solver: "svd" or "gram".

    Returns:
        Two factors [m, r] and [r, n] whose product is W'.
    """
    return _EXACT_SOLVERS[solver](weight, rank)
