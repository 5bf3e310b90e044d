"""What a refresh asks of each rank, by the assignment that training uses."""

from __future__ import annotations

from dataclasses import dataclass

from lift_ds.config import LiftConfig
from lift_ds.model.weights import matrix_names
from lift_ds.planner.formulas import LOW
from lift_ds.planner.models import ModelFacts
from lift_ds.refresh.schedule import RefreshPlan, gradient_bytes, held_bytes, plan_refresh
from lift_ds.selection import MatrixSize, selection_cost
from lift_ds.selection.memory import carry_memory, selection_memory


@dataclass(frozen=True)
class RefreshWork:
    """A refresh, dealt out.

    Args:
        matrices: how many each rank selects in.
        parts: operations of each part of the refresh, by rank and `selection_cost`; the ranks wait for each other at
            its end.
        memory: bytes it takes on the rank that needs most, beside what training holds between steps; the upper
            estimates by which `refresh_memory_gib` is kept.
    """

    matrices: list[int]
    parts: list[list[int]]
    memory: float

    @property
    def operations(self) -> list[int]:
        """Operations of each rank."""
        return [sum(of_rank) for of_rank in zip(*self.parts, strict=True)]

    @property
    def slowest(self) -> int:
        """Operations that all ranks wait for: of the busiest rank in each part."""
        return sum(map(max, self.parts))

    @property
    def imbalance(self) -> float:
        """Operations that all ranks wait for, over their mean."""
        return self.slowest * len(self.matrices) / sum(self.operations)


def refresh_work(facts: ModelFacts, config: LiftConfig, ranks: int, stage: int) -> RefreshWork:
    """Deal a refresh out over the ranks.

    Args:
        facts: of the model.
        config: LIFT's settings.
        ranks: N.
        stage: of ZeRO.

    Raises:
        ValueError: when `refresh_memory_gib` is too small for a matrix.
    """
    # Without ZeRO every rank selects in everything.
    owners, collected = (ranks if stage else 1), stage == 3
    weights = {name: MatrixSize.of(shape, LOW, facts.matrices[name]) for name, shape in facts.shapes.items()}
    sizes = {matrix: size for name, size in weights.items() for matrix in matrix_names(name, size.matrices)}
    plan = plan_refresh(weights, config, owners, collected=collected, device_type="cuda")
    cost = {
        name: selection_cost(size.rows, size.columns, plan.settings[name].lra_rank, plan.settings[name].solver)
        for name, size in sizes.items()
    }
    return RefreshWork(
        matrices=[len(plan.jobs_of(rank)) for rank in range(owners)] * (ranks // owners),
        parts=[[sum(cost[name] for name in own) for own in jobs] * (ranks // owners) for jobs in plan.parts.values()],
        memory=gradient_bytes(sizes.values(), config)
        + max(_memory(jobs, sizes, plan, collected) for jobs in plan.parts.values()),
    )


def _memory(jobs: list[list[str]], sizes: dict[str, MatrixSize], plan: RefreshPlan, collected: bool) -> float:
    """Bytes of a part on the rank that needs most: results waiting for the others, and one matrix at work."""
    # Every rank carries over the states of all matrices, its own or not.
    carrying = max(carry_memory(plan.settings[name].k) for own in jobs for name in own)

    def of_rank(own: list[str]) -> int:
        selecting = [
            selection_memory(sizes[name], plan.settings[name]) + (sizes[name].bytes if collected else 0) for name in own
        ]
        waiting = sum(held_bytes(sizes[name], plan.settings[name], collected) for name in own)
        return waiting + max(carrying, *selecting) if own else carrying

    return float(max(map(of_rank, jobs)))
