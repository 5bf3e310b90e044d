"""What a refresh asks of each rank, by the assignment that training uses."""

from __future__ import annotations

from dataclasses import dataclass

from lift_ds.config import LiftConfig
from lift_ds.planner.formulas import LOW
from lift_ds.planner.models import ModelFacts
from lift_ds.refresh.schedule import RefreshPlan, plan_refresh
from lift_ds.selection import MatrixSize, selection_cost
from lift_ds.selection.memory import carry_memory, selection_memory


@dataclass(frozen=True)
class RefreshWork:
    """A refresh, dealt out.

    Args:
        matrices: how many each rank selects in.
        operations: of each rank, by `selection_cost`.
        memory: bytes it takes on the rank that needs most, beside what training holds between steps; the upper
            estimates by which `refresh_memory_gib` is kept.
    """

    matrices: list[int]
    operations: list[int]
    memory: float

    @property
    def imbalance(self) -> float:
        """Operations of the busiest rank over the mean."""
        return max(self.operations) * len(self.operations) / sum(self.operations)


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
    sizes = {name: MatrixSize.of(shape, LOW) for name, shape in facts.shapes.items()}
    plan = plan_refresh(sizes, config, owners, collected=collected, device_type="cuda")
    cost = {
        name: selection_cost(size.rows, size.columns, config.lra_rank, plan.settings[name].solver)
        for name, size in sizes.items()
    }
    jobs = [plan.jobs_of(rank) for rank in range(owners)]
    return RefreshWork(
        matrices=[len(own) for own in jobs] * (ranks // owners),
        operations=[sum(cost[name] for name in own) for own in jobs] * (ranks // owners),
        memory=max(_memory({name: sizes[name] for name in own}, plan, collected) for own in jobs),
    )


def _memory(own: dict[str, MatrixSize], plan: RefreshPlan, collected: bool) -> float:
    """Bytes of a rank's part: results waiting for the others, and the largest matrix at work."""
    # An index takes two bytes an entry, and so do the weights there, which ZeRO-3 hands out with it.
    waiting = sum(LOW * (1 + collected) * plan.settings[name].k for name in own)
    largest = 0
    for name, size in own.items():
        settings = plan.settings[name]
        selecting = selection_memory(size, settings) + (size.bytes if collected else 0)
        largest = max(largest, selecting, carry_memory(settings.k))
    return float(waiting + largest)
