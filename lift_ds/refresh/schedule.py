"""RefreshPlan: who selects in which matrix, when, and by which settings; from shapes alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lift_ds.config import LiftConfig
from lift_ds.index.encoding import word_count
from lift_ds.model.weights import matrix_names
from lift_ds.runtime.ranks import deal_out
from lift_ds.selection import MatrixSize, SelectionSettings, selection_cost
from lift_ds.selection.cost import most_matrices
from lift_ds.selection.criteria import criterion_named
from lift_ds.selection.memory import bounded, gradient_entries
from lift_ds.selection.settings import settings_for

#: For each rank the names of the matrices it selects in, longest first.
Jobs = list[list[str]]


@dataclass(frozen=True)
class RefreshPlan:
    """The work of a refresh, dealt out.

    Args:
        interval: steps between two selections in one matrix.
        parts: offset in steps within the interval -> who selects in which matrix then.
        settings: name -> how to select there.
    """

    interval: int
    parts: dict[int, Jobs]
    settings: dict[str, SelectionSettings]

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
    weights: Mapping[str, MatrixSize],
    config: LiftConfig,
    ranks: int,
    *,
    collected: bool,
    device_type: str,
) -> RefreshPlan:
    """Deal the matrices out, over time and ranks, and choose the settings for each.

    When a matrix is refreshed does not depend on the ranks, only who selects in it does. Those of a stack are refreshed
    after the same step.

    Args:
        weights: name -> size of the weight.
        config: gives budget, rank, solver, schedule and the bound on memory.
        ranks: N.
        collected: whether an owner receives a copy of the weight (ZeRO-3) or has it.
        device_type: where selections are computed.

    Returns:
        The same plan for the same arguments.

    Raises:
        ValueError: when a matrix cannot be refreshed within the bound; says which, and what it needs.
    """
    sizes = {matrix: size for name, size in weights.items() for matrix in matrix_names(name, size.matrices)}
    settings = {name: settings_for(size, config, device_type) for name, size in sizes.items()}
    costs = {
        name: selection_cost(size.rows, size.columns, settings[name].lra_rank, settings[name].solver)
        for name, size in sizes.items()
    }
    count = min(config.refresh_parts, len(weights))
    names = list(weights)
    parts = {}
    for part in range(count):
        in_part = names[len(names) * part // count : len(names) * (part + 1) // count]
        own = [matrix for name in in_part for matrix in matrix_names(name, weights[name].matrices)]
        first = len(names) * part // count % ranks  # the first job of each part would else be rank 0's
        parts[config.refresh_interval * part // count] = _deal(own, costs, ranks, first)
    # New indices, and where weights are collected the values there, wait on their owner until all have selected.
    held = max(
        sum(held_bytes(sizes[name], settings[name], collected) for name in own)
        for jobs in parts.values()
        for own in jobs
    )
    measured = gradient_bytes(sizes.values(), config)
    for name, size in sizes.items():
        reserved = measured + held + (size.bytes if collected else 0)
        settings[name] = bounded(name, size, settings[name], config.refresh_memory_gib, reserved=reserved, held=held)
    return RefreshPlan(config.refresh_interval, parts, settings)


def gradient_bytes(sizes: Iterable[MatrixSize], config: LiftConfig) -> int:
    """Return what the gradients take that are held while a rank selects; 0 for criteria that do not look at them.

    Args:
        sizes: of all matrices.
        config: gives the criterion and the bound on memory.
    """
    if not criterion_named(config.criterion).gradient:
        return 0
    entries = [size.entries for size in sizes]
    return 4 * min(gradient_entries(max(entries), config.refresh_memory_gib), sum(entries))


def _deal(names: Sequence[str], costs: Mapping[str, int], ranks: int, first: int) -> Jobs:
    """Deal some matrices out over the ranks, beginning with rank `first`."""
    jobs = deal_out([costs[name] for name in names], ranks, most_matrices(len(names), ranks))
    dealt = [[names[job] for job in of_rank] for of_rank in jobs]
    return [dealt[(rank - first) % ranks] for rank in range(ranks)]


def held_bytes(size: MatrixSize, settings: SelectionSettings, collected: bool) -> int:
    """Return what a matrix's new index, and where weights are collected the values there, take on their owner."""
    words = word_count(size.rows, size.columns, settings.k, settings.block_shape)
    return 4 * words + (settings.k * size.itemsize if collected else 0)
