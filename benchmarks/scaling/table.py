"""The CSV of a study: a row for each run, added to by every invocation, rewritten whole and at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

from benchmarks.measure import tables
from benchmarks.measure.tables import FAILED, OK, Row
from benchmarks.scaling.cells import Cell, Sizes

__all__ = ["COLUMNS", "FAILED", "OK", "Row", "cell_of", "left_to_do", "read_rows", "row_of", "with_row", "write_rows"]

#: Column -> kind of its values, in the order of the file.
COLUMNS: dict[str, type] = {
    "method": str, "stage": int, "nodes": int, "ranks": int, "link": str, "link_gbit": float, "scaling": str,
    "hidden": int, "intermediate": int, "layers": int, "vocabulary": int, "sequence": int, "density": float,
    "batch": int, "tokens_per_rank": int, "managed_parameters": int, "trained_parameters": int, "repetition": int,
    "status": str, "error": str,
    "steps": int, "step_seconds": float, "step_seconds_min": float, "step_seconds_max": float,
    "forward_seconds": float, "backward_seconds": float, "optimizer_seconds": float,
    "wire_bytes_sent": float, "wire_bytes_received": float, "logical_bytes": float, "ring_bytes": float,
    "peak_bytes": float, "refresh_seconds": float, "refresh_wire_bytes": float, "measured_gbit": float,
    "predicted_step_seconds": float, "predicted_compute_seconds": float, "predicted_network_seconds": float,
    "predicted_optimizer_seconds": float, "predicted_wire_bytes": float, "predicted_logical_bytes": float,
    "predicted_peak_bytes": float, "predicted_refresh_seconds": float,
    "device": str, "launcher": str, "cpu": str, "cores": int, "threads_per_rank": int, "load_average": float,
    "python": str, "torch": str, "deepspeed": str, "transformers": str, "peft": str, "date": str,
}  # fmt: skip


def row_of(cell: Cell) -> Row:
    """Return the row of a cell that has not run."""
    sizes = cell.sizes
    given = {"link_gbit": cell.gbit, "tokens_per_rank": cell.tokens, "managed_parameters": sizes.managed}
    given |= vars(cell) | vars(sizes)
    return {name: given.get(name) for name in COLUMNS}


def cell_of(row: Row) -> Cell:
    """Return the cell that a row is a measurement of."""
    given: Row = {field.name: row.get(field.name) for field in fields(Cell)}
    sizes = Sizes(**{field.name: row[field.name] for field in fields(Sizes)})
    return Cell(**given | {"sizes": sizes, "gbit": row["link_gbit"]})


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a study; none where the file does not exist.

    Raises:
        ValueError: when it is not the file of a study, or a value cannot be read.
    """
    return tables.read_rows(path, COLUMNS)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write all rows; a reader sees either the old file or the new one."""
    tables.write_rows(path, COLUMNS, rows)


def left_to_do(cells: Iterable[Cell], rows: Iterable[Row], retry: bool) -> list[Cell]:
    """Return the cells that have no row yet; with `retry` also those whose run failed."""
    done = {cell_of(row).key for row in rows if row["status"] == OK or not retry}
    return [cell for cell in cells if cell.key not in done]


def with_row(rows: Iterable[Row], new: Row) -> list[Row]:
    """Return the rows with a new one, which takes the place of an earlier one of the same cell."""
    key = cell_of(new).key
    return [row for row in rows if cell_of(row).key != key] + [new]
