"""The CSV of the comparison, `runs.csv`: its columns."""

from __future__ import annotations

from pathlib import Path

from benchmarks.measure import tables
from benchmarks.measure.tables import Row
from benchmarks.methods.cells import Cell, cell_of

#: Tasks of lm-evaluation-harness that have a column.
COMMONSENSE = (
    "arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "piqa", "social_iqa", "winogrande"
)  # fmt: skip

#: Column -> kind of its values, in the order of the file.
COLUMNS: dict[str, type] = {
    "study": str, "phase": str, "task": str, "method": str, "learning_rate": float, "seed": int,
    "status": str, "error": str,
    "exact_match": float, "target_loss": float, "general_loss": float, "general_loss_rise": float, "divergence": float,
    "commonsense": float, **dict.fromkeys(COMMONSENSE, float),
    "steps": int, "tokens": int, "trained_entries": int, "first_loss": float,
    "at_once": int, "training_seconds": float, "training_peak_bytes": int, "training_peak_device_bytes": int,
    "evaluation_seconds": float, "evaluation_peak_bytes": int,
    "device": str, "cpu": str, "cores": int, "python": str, "torch": str, "transformers": str, "peft": str,
    "lm_eval": str, "commit": str, "date": str, "command": str, "evaluation": str,
}  # fmt: skip


def row_of(cell: Cell) -> Row:
    """Return the row of a cell that has not run."""
    return dict.fromkeys(COLUMNS) | vars(cell)


def read_rows(path: Path) -> list[Row]:
    """Read the rows; none where the file does not exist.

    Raises:
        ValueError: when it is not the file of a comparison, or a value cannot be read.
    """
    return tables.read_rows(path, COLUMNS)


def with_row(rows: list[Row], new: Row) -> list[Row]:
    """Return the rows with a new one, which takes the place of an earlier one of the same cell."""
    return [row for row in rows if cell_of(row) != cell_of(new)] + [new]
