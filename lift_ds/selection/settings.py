"""What a selection goes by: the settings for one matrix, and the size of the matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lift_ds.config import SELECTION_TOLERANCE, LiftConfig
from lift_ds.selection.blocks import BlockShape
from lift_ds.selection.cost import choose_solver
from lift_ds.selection.criteria import criterion_named
from lift_ds.selection.precision import TILE_ENTRIES


@dataclass(frozen=True)
class SelectionSettings:
    """How the principal weights of one matrix are selected.

    Args:
        k: entries to select, whole blocks.
        lra_rank: r; where r >= min(m, n) the matrix itself is ranked.
        solver: "svd", "gram", "chebyshev" or "auto".
        tolerance: share of k in which "chebyshev" may differ from the others.
        seed: of the random vectors that "chebyshev" begins with, and of the criterion "random".
        block_shape: of the blocks that are selected by the sum of their magnitudes; (1, 1) for single entries.
        tile_entries: entries of W' that are formed at a time.
        criterion: by which score entries are selected.
    """

    k: int
    lra_rank: int = 128
    solver: str = "auto"
    tolerance: float = SELECTION_TOLERANCE
    seed: int = 0
    block_shape: BlockShape = (1, 1)
    tile_entries: int = TILE_ENTRIES
    criterion: str = "principal"


@dataclass(frozen=True)
class MatrixSize:
    """The size of a weight matrix, or of each one of a stack.

    Args:
        rows: m.
        columns: n.
        itemsize: bytes of an entry.
        matrices: how many there are of this size, one after the other.
    """

    rows: int
    columns: int
    itemsize: int
    matrices: int = 1

    @classmethod
    def of(cls, shape: Sequence[int], itemsize: int, matrices: int = 1) -> MatrixSize:
        """Return the size of matrices of a shape (m, n)."""
        rows, columns = shape
        return cls(rows, columns, itemsize, matrices)

    @property
    def entries(self) -> int:
        """m n."""
        return self.rows * self.columns

    @property
    def bytes(self) -> int:
        """What the matrix takes in memory."""
        return self.entries * self.itemsize


def settings_for(matrix: MatrixSize, config: LiftConfig, device_type: str) -> SelectionSettings:
    """Return how to select in a matrix by the configuration.

    Args:
        matrix: its size.
        config: LIFT's settings.
        device_type: "cpu", "cuda", ...; where the selection is computed, which decides what "auto" means.

    Raises:
        ValueError: the solver is not for the criterion.
    """
    criterion = criterion_named(config.criterion)
    # Of full rank, W' = W and nothing is factored.
    lra_rank = config.lra_rank if criterion.low_rank else min(matrix.rows, matrix.columns)
    return SelectionSettings(
        k=config.entries(matrix.rows, matrix.columns),
        lra_rank=lra_rank,
        solver=_solver(matrix, lra_rank, config, device_type),
        tolerance=config.selection_tolerance,
        seed=config.seed,
        block_shape=config.block_shape,
        criterion=config.criterion,
    )


def _solver(matrix: MatrixSize, lra_rank: int, config: LiftConfig, device_type: str) -> str:
    """Return the solver for a matrix; never "auto"."""
    criterion = criterion_named(config.criterion)
    watched = criterion.largest or not criterion.low_rank  # nothing is factored in the second case
    if config.solver == "chebyshev" and not watched:
        raise ValueError(
            f"solver={config.solver!r} stops once the largest entries of W' are right, and criterion="
            f"{config.criterion!r} does not take those; give solver='auto', 'gram' or 'svd'"
        )
    if config.solver != "auto":
        return config.solver
    return choose_solver(matrix.rows, matrix.columns, lra_rank, device_type) if watched else "gram"
