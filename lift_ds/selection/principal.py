"""Principal indices: the positions of the largest entries of the low-rank approximation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lift_ds.config import SELECTION_TOLERANCE, SOLVERS
from lift_ds.selection.blocks import BlockShape, block_scores, divides, entries_of_blocks
from lift_ds.selection.chebyshev import chebyshev
from lift_ds.selection.choice import choose_solver
from lift_ds.selection.low_rank import Factors, low_rank_factors
from lift_ds.selection.precision import full_precision, largest_magnitude, working_precision
from lift_ds.selection.tiles import TILE_ENTRIES, tiles
from lift_ds.selection.topk import RunningTopK

#: Scores that are looked at to bound the threshold from below before all are computed, and how many more than k may lie
#: above that bound for each that should.
_SAMPLE = 2**18
_MARGIN = 1.25


@dataclass(frozen=True)
class Selected:
    """The principal weights of one matrix, and how they were found.

    Args:
        index: flat row-major positions, int64 [k], ascending.
        solver: "svd", "gram" or "chebyshev", whichever gave the approximation; None where W' = W.
        fell_back: whether "chebyshev" was to and did not reach the tolerance.
        estimate: share of k that may differ from the exact selection, as far as the solver can tell; 0 for exact ones.
        subspace: what "chebyshev" starts from next time, float16 on the host; None from other solvers.
        rounds: of its iteration.
        products: of a Gram matrix with a block of vectors in it.
    """

    index: Tensor
    solver: str | None
    fell_back: bool = False
    estimate: float = 0.0
    subspace: Tensor | None = None
    rounds: int = 0
    products: int = 0


def principal_indices(
    weight: Tensor,
    *,
    k: int,
    lra_rank: int = 128,
    solver: str = "auto",
    tolerance: float = SELECTION_TOLERANCE,
    block_shape: BlockShape = (1, 1),
    seed: int = 0,
    tile_entries: int = TILE_ENTRIES,
) -> Tensor:
    """Select the principal weights of one matrix (section 3 of the paper).

    Args:
        weight: [m, n], any floating dtype, finite.
        k: entries to select, 1 <= k <= m * n; whole blocks.
        lra_rank: r; where r >= min(m, n) the matrix itself is ranked.
        solver: "svd", "gram", "chebyshev" or "auto".
        tolerance: share of k in which "chebyshev" may differ from the others.
        block_shape: of the blocks that are selected by the sum of their magnitudes; (1, 1) for single entries.
        seed: of what "chebyshev" draws.
        tile_entries: entries of W' that are formed at a time.

    Returns:
        Flat row-major positions of the k largest entries of abs(W'), int64 [k], ascending. One result for
        one matrix: ties are broken by position.

    Raises:
        ValueError: when the matrix is not 2-D, k or lra_rank is out of range, the solver is unknown, the blocks do not
            divide it, or an entry is NaN or infinite.
    """
    return select_principal(
        weight,
        k=k,
        lra_rank=lra_rank,
        solver=solver,
        tolerance=tolerance,
        block_shape=block_shape,
        seed=seed,
        tile_entries=tile_entries,
    ).index


@torch.no_grad()
def select_principal(
    weight: Tensor,
    *,
    k: int,
    lra_rank: int,
    solver: str = "auto",
    tolerance: float = SELECTION_TOLERANCE,
    start: Tensor | None = None,
    seed: int = 0,
    block_shape: BlockShape = (1, 1),
    tile_entries: int = TILE_ENTRIES,
) -> Selected:
    """Like `principal_indices`, from the subspace of an earlier call on, and with what there is to know about it.

    Args:
        weight: [m, n], and the other arguments as for `principal_indices`.
        start: `subspace` of the last result for this matrix.

    Raises:
        ValueError: as `principal_indices`.
    """
    _check(weight, k, lra_rank, solver, block_shape)
    if not math.isfinite(largest_magnitude(weight, tile_entries)):
        raise ValueError(f"weight {tuple(weight.shape)} has NaN or infinite entries; no entry can be ranked")
    with full_precision(weight.device):
        factors, found = _approximate(weight, k, lra_rank, solver, tolerance, start, seed)
        blocks = k // (block_shape[0] * block_shape[1])
        largest = _largest(_Scores(weight, factors, block_shape), blocks, tile_entries)
        index = entries_of_blocks(largest, weight.shape[1], block_shape)
    return Selected(index=index, **found)


def _check(weight: Tensor, k: int, lra_rank: int, solver: str, block_shape: BlockShape) -> None:
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; principal weights are selected in 2-D matrices")
    if not 1 <= k <= weight.numel():
        raise ValueError(f"k={k} is not in 1..{weight.numel()}, the entries of a {tuple(weight.shape)} matrix")
    if lra_rank < 1:
        raise ValueError(f"lra_rank={lra_rank} is not at least 1")
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} is not one of {', '.join(SOLVERS)}")
    if not divides(block_shape, weight.shape):
        raise ValueError(f"block_shape={block_shape} does not divide a {tuple(weight.shape)} matrix into whole blocks")
    if k % (block_shape[0] * block_shape[1]):
        raise ValueError(f"k={k} is no whole number of blocks of shape {block_shape}")


def _approximate(
    weight: Tensor, k: int, rank: int, solver: str, tolerance: float, start: Tensor | None, seed: int
) -> tuple[Factors | None, dict[str, Any]]:
    """Return the factors of W', None where W' = W, and the fields of `Selected` about them."""
    if rank >= min(weight.shape):
        return None, {"solver": None}
    if solver == "auto":
        solver = choose_solver(weight.shape[0], weight.shape[1], rank, weight.device.type)
    if solver != "chebyshev":
        return low_rank_factors(weight, rank, solver), {"solver": solver}
    found = chebyshev(weight, rank, k=k, tolerance=tolerance, start=start, seed=seed)
    about: dict[str, Any] = {"subspace": found.subspace, "rounds": found.rounds, "products": found.products}
    if found.factors is None:
        return low_rank_factors(weight, rank, "gram"), {"solver": "gram", "fell_back": True, **about}
    return found.factors, {"solver": "chebyshev", "estimate": found.estimate, **about}


class _Scores:
    """The magnitudes of W', summed over blocks, computed where they are asked for.

    Args:
        weight: [m, n].
        factors: of W'; None where W' = W.
        block_shape: (p, q); scores are numbered row-major in the grid [m / p, n / q] of blocks.
    """

    def __init__(self, weight: Tensor, factors: Factors | None, block_shape: BlockShape) -> None:
        self._weight = weight
        self._factors = factors
        self._block_shape = block_shape
        self.grid = (weight.shape[0] // block_shape[0], weight.shape[1] // block_shape[1])
        self.entries_of_a_score = block_shape[0] * block_shape[1]
        self.device = weight.device

    def rows(self, rows: slice) -> Tensor:
        """Return the scores of some rows of the grid, [rows, n / q]."""
        height = self._block_shape[0]
        return self._of(slice(rows.start * height, rows.stop * height), slice(None))

    def sample(self, size: int) -> Tensor:
        """Return about as many scores, from evenly spaced rows and columns of the grid."""
        side = math.isqrt(size)
        return self._of(*(self._spread(axis, side) for axis in (0, 1)))

    def _spread(self, axis: int, count: int) -> Tensor:
        """Return the matrix rows (or columns) of some evenly spaced rows (or columns) of the grid."""
        blocks = torch.arange(0, self.grid[axis], max(1, self.grid[axis] // count), device=self.device)
        within = torch.arange(self._block_shape[axis], device=self.device)
        return (blocks[:, None] * self._block_shape[axis] + within).flatten()

    def _of(self, rows: slice | Tensor, columns: slice | Tensor) -> Tensor:
        if self._factors is None:
            values = working_precision(self._weight[rows][:, columns])
        else:
            values = self._factors[0][rows] @ self._factors[1][:, columns]
        return block_scores(values.abs_() if self._factors else values.abs(), self._block_shape)


def _largest(scores: _Scores, count: int, tile_entries: int) -> Tensor:
    """Return the numbers of the blocks with the largest scores, int64 [count], ascending."""
    floor = _floor(scores, count)
    largest = _ranked(scores, count, tile_entries, floor)
    if largest is None:  # the sample was not like the rest
        largest = _ranked(scores, count, tile_entries, None)
    assert largest is not None, "without a floor there are enough candidates"
    return largest


def _floor(scores: _Scores, count: int) -> Tensor | None:
    """Return a bound that is likely, not sure, to lie below the threshold; None where a sample cannot tell."""
    sample = scores.sample(_SAMPLE).flatten()
    above = math.ceil(_MARGIN * count / (scores.grid[0] * scores.grid[1]) * sample.numel())
    if above >= sample.numel():
        return None
    return sample.kthvalue(sample.numel() - above).values


def _ranked(scores: _Scores, count: int, tile_entries: int, floor: Tensor | None) -> Tensor | None:
    """Rank all scores, a tile at a time; None where fewer than `count` lie above the floor."""
    largest = RunningTopK(count, scores.device, floor)
    rows, columns = scores.grid
    for tile in tiles(rows, columns * scores.entries_of_a_score, tile_entries):
        largest.add(scores.rows(tile))
    return largest.positions()
