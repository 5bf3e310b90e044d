"""RefreshPlan: who selects in which matrix, and in tiles of which size; found before training, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lift_ds.config import LiftConfig
from lift_ds.selection import deal_out, selection_cost
from lift_ds.selection.encoding import word_count
from lift_ds.selection.memory import carry_memory, selection_memory, tile_entries_within
from lift_ds.selection.tiles import TILE_ENTRIES

_GIB = 2**30


@dataclass(frozen=True)
class RefreshPlan:
    """The work of a refresh, dealt out.

    Args:
        jobs: for each rank the names of the matrices it selects in, longest first.
        tile_entries: name -> entries of W' that are formed at a time.
    """

    jobs: list[list[str]]
    tile_entries: dict[str, int]

    def owner_of(self, name: str) -> int:
        """Return the rank that selects in a matrix."""
        return next(rank for rank, names in enumerate(self.jobs) if name in names)


def plan_refresh(
    shapes: Mapping[str, tuple[int, int]], itemsize: int, config: LiftConfig, ranks: int, *, collected: bool
) -> RefreshPlan:
    """Deal the matrices out and choose their tiles.

    Args:
        shapes: name -> (m, n).
        itemsize: bytes of an entry of the weights.
        config: gives budget, rank, solver and the bound on memory.
        ranks: N.
        collected: whether an owner receives a copy of the weight (ZeRO-3) or has it.

    Returns:
        The same plan for the same arguments.

    Raises:
        ValueError: when a matrix cannot be refreshed within the bound; says which, and what it needs.
    """
    names = list(shapes)
    costs = [selection_cost(*shapes[name], config.lra_rank, config.solver) for name in names]
    jobs = [[names[job] for job in jobs] for jobs in deal_out(costs, ranks)]
    # New indices, and where weights are collected the values there, wait on their owner until all have selected.
    held = max(sum(_held(shapes[name], itemsize, config, collected) for name in rank) for rank in jobs)
    tiles = {}
    for name, (rows, columns) in shapes.items():
        reserved = held + (rows * columns * itemsize if collected else 0)
        tiles[name] = _tile_entries(name, rows, columns, itemsize, config, reserved, held)
    return RefreshPlan(jobs, tiles)


def tile_entries_for(name: str, rows: int, columns: int, itemsize: int, config: LiftConfig) -> int:
    """Return the tile with which selecting in one matrix alone stays within the bound of the configuration.

    Raises:
        ValueError: when none does.
    """
    return _tile_entries(name, rows, columns, itemsize, config, 0, 0)


def _held(shape: tuple[int, int], itemsize: int, config: LiftConfig, collected: bool) -> int:
    k = config.entries(*shape)
    return 4 * word_count(*shape, k) + (k * itemsize if collected else 0)


def _tile_entries(
    name: str, rows: int, columns: int, itemsize: int, config: LiftConfig, reserved: int, held: int
) -> int:
    if config.refresh_memory_gib is None:
        return TILE_ENTRIES
    bound = int(config.refresh_memory_gib * _GIB)
    k = config.entries(rows, columns)
    matrix = (rows, columns, k, config.lra_rank, config.solver, itemsize)
    tile = tile_entries_within(bound - reserved, *matrix)
    least = max(reserved + selection_memory(*matrix, tile_entries=columns), held + carry_memory(k))
    if tile is None or least > bound:
        raise ValueError(
            f"refresh_memory_gib={config.refresh_memory_gib:g}: refreshing {name} [{rows}, {columns}] with "
            f"{k:,} entries needs at least {least / _GIB:.3g}; raise it, or leave it out for no bound"
        )
    return tile
