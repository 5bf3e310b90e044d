"""Selecting in one matrix: by default the principal weights, the largest entries of the low-rank approximation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lift_ds.config import SELECTION_TOLERANCE, SOLVERS
from lift_ds.selection.blocks import BlockShape, block_sums, divides, entries_of_blocks
from lift_ds.selection.chebyshev import chebyshev
from lift_ds.selection.cost import choose_solver
from lift_ds.selection.criteria import Matrix, Part, Scores, criterion_named
from lift_ds.selection.low_rank import Factors, low_rank_factors
from lift_ds.selection.precision import TILE_ENTRIES, full_precision, largest_magnitude, tiles
from lift_ds.selection.settings import SelectionSettings
from lift_ds.selection.topk import SAMPLE_SCORES, RunningTopK, kth_largest, on_host

#: How many more scores than k may lie above the bound that a sample gives, for each that should.
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
        k: entries to select, 1 <= k <= m * n, and the other arguments as in `SelectionSettings`.

    Returns:
        Flat row-major positions of the k largest entries of abs(W'), int64 [k], ascending. One result for
        one matrix: ties are broken by position.

    Raises:
        ValueError: when the matrix is not 2-D, k or lra_rank is out of range, the solver is unknown, the blocks do not
            divide it, or an entry is NaN or infinite.
    """
    settings = SelectionSettings(k, lra_rank, solver, tolerance, seed, block_shape, tile_entries)
    return select_principal(weight, settings).index


@torch.no_grad()
def select_principal(
    weight: Tensor,
    settings: SelectionSettings,
    start: Tensor | None = None,
    name: str = "",
    gradient: Tensor | None = None,
) -> Selected:
    """Like `principal_indices`, from the subspace of an earlier call on, and with what there is to know about it.

    Args:
        weight: [m, n], any floating dtype, finite.
        settings: what is selected, and how.
        start: `subspace` of the last result for this matrix.
        name: dotted name of the layer, by which the criterion "random" tells matrices apart.
        gradient: mean |dL/dW|, float32 [m, n], for criteria that look at it.

    Raises:
        ValueError: as `principal_indices`.
    """
    _check(weight, settings)
    if not math.isfinite(largest_magnitude(weight, settings.tile_entries)):
        raise ValueError(f"weight {tuple(weight.shape)} has NaN or infinite entries; no entry can be ranked")
    block_shape = settings.block_shape
    with full_precision(weight.device):
        factors, found = _approximate(weight, settings, start)
        blocks = settings.k // (block_shape[0] * block_shape[1])
        scores = criterion_named(settings.criterion).scores(Matrix(weight, factors, name, settings.seed, gradient))
        of_blocks = _BlockScores(weight.shape, scores, block_shape, weight.device)
        largest = _largest(of_blocks, blocks, settings.tile_entries)
        index = entries_of_blocks(largest, weight.shape[1], block_shape)
    return Selected(index=index, **found)


def select_in(
    name: str,
    weight: Tensor,
    settings: SelectionSettings,
    start: Tensor | None = None,
    gradient: Tensor | None = None,
) -> Selected:
    """Select in the weight of a layer.

    Args:
        name: dotted name of the layer, for the message of an error; the other arguments as in `select_principal`.

    Raises:
        ValueError: as `select_principal`, naming the weight.
    """
    try:
        return select_principal(weight, settings, start, name, gradient)
    except ValueError as error:
        raise ValueError(f"{name}.weight: {error}") from error


def fallback_note(matrices: int) -> str:
    """Return what a log line says of matrices in which "chebyshev" fell back to "gram"."""
    if not matrices:
        return ""
    return f'; in {matrices} of them chebyshev did not reach "selection_tolerance" and gram was used'


def _check(weight: Tensor, settings: SelectionSettings) -> None:
    k, block_shape = settings.k, settings.block_shape
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; principal weights are selected in 2-D matrices")
    if not 1 <= k <= weight.numel():
        raise ValueError(f"k={k} is not in 1..{weight.numel()}, the entries of a {tuple(weight.shape)} matrix")
    if settings.lra_rank < 1:
        raise ValueError(f"lra_rank={settings.lra_rank} is not at least 1")
    if settings.solver not in SOLVERS:
        raise ValueError(f"solver={settings.solver!r} is not one of {', '.join(SOLVERS)}")
    if not divides(block_shape, weight.shape):
        raise ValueError(f"block_shape={block_shape} does not divide a {tuple(weight.shape)} matrix into whole blocks")
    if k % (block_shape[0] * block_shape[1]):
        raise ValueError(f"k={k} is no whole number of blocks of shape {block_shape}")


def _approximate(
    weight: Tensor, settings: SelectionSettings, start: Tensor | None
) -> tuple[Factors | None, dict[str, Any]]:
    """Return the factors of W', None where W' = W, and the fields of `Selected` about them."""
    rank, solver = settings.lra_rank, settings.solver
    if rank >= min(weight.shape):
        return None, {"solver": None}
    if solver == "auto":
        solver = choose_solver(weight.shape[0], weight.shape[1], rank, weight.device.type)
    if solver != "chebyshev":
        return low_rank_factors(weight, rank, solver), {"solver": solver}
    found = chebyshev(weight, rank, k=settings.k, tolerance=settings.tolerance, start=start, seed=settings.seed)
    about: dict[str, Any] = {"subspace": found.subspace, "rounds": found.rounds, "products": found.products}
    if found.factors is None:
        return low_rank_factors(weight, rank, "gram"), {"solver": "gram", "fell_back": True, **about}
    return found.factors, {"solver": "chebyshev", "estimate": found.estimate, **about}


class _BlockScores:
    """The scores of the entries of a matrix, summed over blocks, computed where they are asked for.

    Args:
        shape: [m, n].
        of_entries: gives the scores of the entries.
        block_shape: (p, q); blocks are numbered row-major in their grid [m / p, n / q].
        device: of the scores.
    """

    def __init__(self, shape: torch.Size, of_entries: Scores, block_shape: BlockShape, device: torch.device) -> None:
        self._of_entries = of_entries
        self._block_shape = block_shape
        self.grid = (shape[0] // block_shape[0], shape[1] // block_shape[1])
        self.entries_of_a_score = block_shape[0] * block_shape[1]
        self.device = device

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

    def _of(self, rows: Part, columns: Part) -> Tensor:
        return block_sums(self._of_entries(rows, columns), self._block_shape)


def _largest(scores: _BlockScores, count: int, tile_entries: int) -> Tensor:
    """Return the numbers of the blocks with the largest scores, int64 [count], ascending."""
    floor = _floor(scores, count) if on_host(scores.device) else None
    largest = _ranked(scores, count, tile_entries, floor)
    if largest is None:  # the sample was not like the rest
        largest = _ranked(scores, count, tile_entries, None)
    assert largest is not None, "without a floor there are enough candidates"
    return largest


def _floor(scores: _BlockScores, count: int) -> Tensor | None:
    """Return a bound that is likely, not sure, to lie below the threshold; None where a sample cannot tell."""
    sample = scores.sample(SAMPLE_SCORES)
    above = math.ceil(_MARGIN * count / (scores.grid[0] * scores.grid[1]) * sample.numel())
    return kth_largest(sample, above + 1) if above < sample.numel() else None


def _ranked(scores: _BlockScores, count: int, tile_entries: int, floor: Tensor | None) -> Tensor | None:
    """Rank all scores, a tile at a time; None where fewer than `count` lie above the floor."""
    largest = RunningTopK(count, scores.device, floor)
    rows, columns = scores.grid
    for tile in tiles(rows, columns * scores.entries_of_a_score, tile_entries):
        largest.add(scores.rows(tile))
    return largest.positions()
