"""Principal indices: the positions of the largest entries of the low-rank approximation."""

from __future__ import annotations

import torch
from torch import Tensor

from lift_ds.config import SOLVERS
from lift_ds.selection.low_rank import low_rank_factors, working_precision
from lift_ds.selection.tiles import TILE_ENTRIES, tiles
from lift_ds.selection.topk import RunningTopK


@torch.no_grad()
def principal_indices(
    weight: Tensor, *, k: int, lra_rank: int = 128, solver: str = "auto", tile_entries: int = TILE_ENTRIES
) -> Tensor:
    """Select the principal weights of one matrix (section 3 of the paper).

    Args:
        weight: [m, n], any floating dtype, finite.
        k: entries to select, 1 <= k <= m * n.
        lra_rank: r; where r >= min(m, n) the matrix itself is ranked.
        solver: "svd", "gram" or "auto".
        tile_entries: entries of W' that are formed at a time.

    Returns:
        Flat row-major positions of the k largest entries of abs(W'), int64 [k], ascending. One result for
        one matrix: ties are broken by position.

    Raises:
        ValueError: when the matrix is not 2-D, k or lra_rank is out of range, the solver is unknown, or an entry is NaN
            or infinite.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; principal weights are selected in 2-D matrices")
    if not 1 <= k <= weight.numel():
        raise ValueError(f"k={k} is not in 1..{weight.numel()}, the entries of a {tuple(weight.shape)} matrix")
    if lra_rank < 1:
        raise ValueError(f"lra_rank={lra_rank} is not at least 1")
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} is not one of {', '.join(SOLVERS)}")
    rows, columns = weight.shape
    if not all(torch.isfinite(weight[tile]).all() for tile in tiles(rows, columns, tile_entries)):
        raise ValueError(f"weight {tuple(weight.shape)} has NaN or infinite entries; no entry can be ranked")
    factors = low_rank_factors(weight, lra_rank, solver)
    largest = RunningTopK(k, weight.device)
    for tile in tiles(rows, columns, tile_entries):
        approximation = working_precision(weight[tile]) if factors is None else factors[0][tile] @ factors[1]
        largest.add(approximation.abs())  # [rows of the tile, n]
    return largest.positions()
