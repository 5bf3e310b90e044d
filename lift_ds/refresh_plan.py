"""RefreshPlan: who selects in which matrix, when, by which solver and in tiles of which size; from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lift_ds.config import LiftConfig
from lift_ds.selection import choose_solver, deal_out, selection_cost
from lift_ds.selection.encoding import word_count
from lift_ds.selection.memory import carry_memory, selection_memory, tile_entries_within
from lift_ds.selection.tiles import TILE_ENTRIES

_GIB = 2**30

#: For each rank the names of the matrices it selects in, longest first.
Jobs = list[list[str]]


@dataclass(frozen=True)
class RefreshPlan:
    """The work of a refresh, dealt out.

    Args:
        interval: steps between two selections in one matrix.
        parts: offset in steps within the interval -> who selects in which matrix then.
        solvers: name -> "svd", "gram" or "chebyshev".
        tile_entries: name -> entries of W' that are formed at a time.
    """

    interval: int
    parts: dict[int, Jobs]
    solvers: dict[str, str]
    tile_entries: dict[str, int]

    def due(self, step: int) -> Jobs | None:
        """Return what is to be refreshed after an applied step; None after most of them.

        Every matrix keeps its first selection for a whole interval, at least.
        """
        return self.parts.get(step % self.interval) if step >= self.interval else None

    def completes(self, step: int) -> bool:
        """Tell whether what is refreshed after a step is the last part of a refresh."""
        return step % self.interval == max(self.parts)

    def jobs_of(self, rank: int) -> list[str]:
        """Return the names of the matrices that a rank selects in."""
        return [name for jobs in self.parts.values() for name in jobs[rank]]


def plan_refresh(
    shapes: Mapping[str, tuple[int, int]],
    itemsize: int,
    config: LiftConfig,
    ranks: int,
    *,
    collected: bool,
    device_type: str,
) -> RefreshPlan:
    """Deal the matrices out, over time and ranks, and choose their solvers and tiles.

    When a matrix is refreshed does not depend on the ranks, only who selects in it does.

    Args:
        shapes: name -> (m, n).
        itemsize: bytes of an entry of the weights.
        config: gives budget, rank, solver, schedule and the bound on memory.
        ranks: N.
        collected: whether an owner receives a copy of the weight (ZeRO-3) or has it.
        device_type: where selections are computed.

    Returns:
        The same plan for the same arguments.

    Raises:
        ValueError: when a matrix cannot be refreshed within the bound; says which, and what it needs.
    """
    solvers = {name: solver_for(*shape, config, device_type) for name, shape in shapes.items()}
    costs = {name: selection_cost(*shape, config.lra_rank, solvers[name]) for name, shape in shapes.items()}
    count = min(config.refresh_parts, len(shapes))
    names = list(shapes)
    parts = {}
    for part in range(count):
        own = names[len(names) * part // count : len(names) * (part + 1) // count]
        first = len(names) * part // count % ranks  # the first job of each part would else be rank 0's
        parts[config.refresh_interval * part // count] = _deal(own, costs, ranks, first)
    # New indices, and where weights are collected the values there, wait on their owner until all have selected.
    held = max(
        sum(_held(shapes[name], itemsize, config, collected) for name in own) for jobs in parts.values() for own in jobs
    )
    tiles = {}
    for name, (rows, columns) in shapes.items():
        reserved = held + (rows * columns * itemsize if collected else 0)
        tiles[name] = _tile_entries(name, rows, columns, itemsize, config, solvers[name], reserved, held)
    return RefreshPlan(config.refresh_interval, parts, solvers, tiles)


def solver_for(rows: int, columns: int, config: LiftConfig, device_type: str) -> str:
    """Return the solver that selects in a matrix of that shape: the setting, or what "auto" means there."""
    if config.solver != "auto":
        return config.solver
    return choose_solver(rows, columns, config.lra_rank, device_type)


def tile_entries_for(name: str, rows: int, columns: int, itemsize: int, config: LiftConfig, solver: str) -> int:
    """Return the tile with which selecting in one matrix alone stays within the bound of the configuration.

    Raises:
        ValueError: when none does.
    """
    return _tile_entries(name, rows, columns, itemsize, config, solver, 0, 0)


def _deal(names: Sequence[str], costs: Mapping[str, int], ranks: int, first: int) -> Jobs:
    """Deal some matrices out over the ranks, beginning with rank `first`."""
    dealt = [[names[job] for job in jobs] for jobs in deal_out([costs[name] for name in names], ranks)]
    return [dealt[(rank - first) % ranks] for rank in range(ranks)]


def _held(shape: tuple[int, int], itemsize: int, config: LiftConfig, collected: bool) -> int:
    k = config.entries(*shape)
    return 4 * word_count(*shape, k, config.block_shape) + (k * itemsize if collected else 0)


def _tile_entries(
    name: str, rows: int, columns: int, itemsize: int, config: LiftConfig, solver: str, reserved: int, held: int
) -> int:
    if config.refresh_memory_gib is None:
        return TILE_ENTRIES
    bound = int(config.refresh_memory_gib * _GIB)
    k = config.entries(rows, columns)
    matrix = (rows, columns, k, config.lra_rank, solver, itemsize)
    height = config.block_shape[0]
    tile = tile_entries_within(bound - reserved, *matrix, block_rows=height)
    least = max(
        reserved + selection_memory(*matrix, tile_entries=height * columns, block_rows=height), held + carry_memory(k)
    )
    if tile is None or least > bound:
        raise ValueError(
            f"refresh_memory_gib={config.refresh_memory_gib:g}: refreshing {name} [{rows}, {columns}] with "
            f"{k:,} entries needs at least {least / _GIB:.3g}; raise it, or leave it out for no bound"
        )
    return tile
