"""Plan: the choices a user has for a model on a cluster, compared; the one to take."""

from __future__ import annotations

from dataclasses import dataclass

from lift_ds.config import LiftConfig
from lift_ds.planner.estimate import METHODS, Choice, Cluster, Estimate, estimate
from lift_ds.planner.models import ModelFacts

STAGES = (0, 1, 2, 3)

#: Times within this factor count as equal: they are estimates.
NEARLY = 1.02


@dataclass(frozen=True)
class Request:
    """What to plan.

    Args:
        batch: sequences of an optimizer step, on all ranks together.
        sequence: tokens of a sequence.
        methods: to compare.
        stages: of ZeRO to compare.
        micro_batch: sequences of a forward on a rank; None for the fastest that fits.
        checkpointing: of activations; None for whichever is faster among those that fit.
        offload: whether the optimizer may go to the host.
    """

    batch: int
    sequence: int
    methods: tuple[str, ...] = METHODS
    stages: tuple[int, ...] = STAGES
    micro_batch: int | None = None
    checkpointing: bool | None = None
    offload: bool = True


@dataclass(frozen=True)
class Plan:
    """What was found.

    Args:
        facts: of the model.
        config: LIFT's settings.
        cluster: where.
        request: what was asked.
        batch: sequences of a step; a multiple of the ranks.
        rows: the best choice of each method and stage, with LIFT's frozen weights on all nodes and within each; where
            none fits, the one that misses least.
        recommended: the fastest that fits, of the first method asked for that has one; None where nothing fits.
    """

    facts: ModelFacts
    config: LiftConfig
    cluster: Cluster
    request: Request
    batch: int
    rows: list[Estimate]
    recommended: Estimate | None


def make_plan(facts: ModelFacts, config: LiftConfig, cluster: Cluster, request: Request) -> Plan:
    """Compare the choices.

    Args:
        facts: of the model.
        config: LIFT's settings.
        cluster: where.
        request: what to compare.

    Raises:
        ValueError: for more ranks than matrices, or a micro-batch that the batch is no multiple of.
    """
    ranks = cluster.ranks
    matrices = sum(facts.matrices.values())
    if ranks > matrices:
        raise ValueError(
            f"--nodes {cluster.nodes} x --gpus-per-node {cluster.gpus_per_node} are {ranks} ranks, more than the "
            f"{matrices} matrices of {facts.name}: the rest would have nothing to select; take at most {matrices}"
        )
    per_rank = max(1, -(-request.batch // ranks))
    if request.micro_batch is not None and per_rank % request.micro_batch:
        raise ValueError(
            f"--micro-batch {request.micro_batch}: a batch of {per_rank * ranks} on {ranks} ranks is {per_rank} a "
            f"rank, which is no multiple of it; valid: {', '.join(map(str, _divisors(per_rank)))}"
        )
    rows = []
    for method in request.methods:
        for stage in request.stages:
            for copy_ranks in _copies(method, stage, cluster):
                choices = _choices(method, stage, per_rank, request, copy_ranks)
                rows.append(_best([estimate(facts, config, choice, cluster) for choice in choices]))
    return Plan(facts, config, cluster, request, per_rank * ranks, rows, _recommended(rows, request.methods))


def _copies(method: str, stage: int, cluster: Cluster) -> list[int]:
    """Return how many ranks may share a copy of the frozen weights; 0 for all."""
    return [0, cluster.gpus_per_node] if method == "lift" and stage == 3 and cluster.nodes > 1 else [0]


def _choices(method: str, stage: int, per_rank: int, request: Request, copy_ranks: int) -> list[Choice]:
    sizes = [request.micro_batch] if request.micro_batch else _divisors(per_rank)
    recomputing = [request.checkpointing] if request.checkpointing is not None else [False, True]
    # LIFT's and LoRA's states are small; the host is for what does not fit otherwise.
    places = [False, True] if request.offload and stage in (2, 3) else [False]
    return [
        Choice(method, stage, offload, size, per_rank // size, checkpointing, request.sequence, copy_ranks)
        for offload in places
        for checkpointing in recomputing
        for size in sizes
    ]


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _best(found: list[Estimate]) -> Estimate:
    """Return the fastest that fits, on the host only what must be; of nearly equal ones that with fewest micro-batches.

    Where none fits, the one that misses least.
    """
    fitting = [one for one in found if one.fits]
    if not fitting:
        return min(found, key=lambda one: one.missing)
    on_device = [one for one in fitting if not one.choice.offload] or fitting
    fastest = min(one.time.total for one in on_device)
    close = [one for one in on_device if one.time.total <= NEARLY * fastest]
    return min(close, key=lambda one: (one.choice.accumulation, one.peak))


def _recommended(rows: list[Estimate], methods: tuple[str, ...]) -> Estimate | None:
    """Return the fastest that fits, LIFT's where LIFT is compared; of equally fast ones the lower stage."""
    for method in ("lift", *methods):
        fitting = [row for row in rows if row.choice.method == method and row.fits]
        if fitting:
            fastest = min(row.time.total for row in fitting)
            return next(row for row in fitting if row.time.total <= NEARLY * fastest)
    return None
