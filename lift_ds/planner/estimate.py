"""Estimate: one way to train a model on a cluster, with what it holds, sends and takes."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from lift_ds.config import LiftConfig
from lift_ds.model.layers import GRADIENT_TILE, HOST_GRADIENT_TILE
from lift_ds.planner import formulas, peak, speed
from lift_ds.planner.formulas import Setting
from lift_ds.planner.hardware import Hardware
from lift_ds.planner.models import ModelFacts
from lift_ds.planner.peak import Activations
from lift_ds.planner.refresh_work import RefreshWork, refresh_work

METHODS = ("full", "lora", "lift")

#: DeepSpeed's buckets in the files that a plan writes, in elements; ZeRO-3's by the width of the model, as Accelerate
#: resolves "auto", and its limit of gathered elements.
BUCKET, LIVE = 50_000_000, 1_000_000_000

REFRESH = "refresh"


@dataclass(frozen=True)
class Cluster:
    """Nodes, and what they are made of.

    Args:
        nodes: how many.
        gpus_per_node: devices of each.
        hardware: of the devices and links.
        host_gb: memory of a node's host, in 10^9 bytes.
    """

    nodes: int
    gpus_per_node: int
    hardware: Hardware
    host_gb: float = 1000.0

    @property
    def ranks(self) -> int:
        """N."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Choice:
    """What a user decides.

    Args:
        method: "full", "lora" or "lift".
        stage: of ZeRO.
        offload: whether the optimizer is on the host.
        micro_batch: sequences of a forward on a rank.
        accumulation: micro-batches of a step.
        checkpointing: of activations.
        sequence: tokens of a sequence.
        copy_ranks: ranks that share a copy of the frozen weights in ZeRO-3; 0 for all.
    """

    method: str
    stage: int
    offload: bool = False
    micro_batch: int = 1
    accumulation: int = 1
    checkpointing: bool = False
    sequence: int = 2048
    copy_ranks: int = 0


@dataclass(frozen=True)
class Estimate:
    """What a choice comes to on one rank.

    Args:
        choice: the choice.
        persistent: category -> bytes held between steps; of gradients those between backward and step.
        moments: moment -> bytes in all; the largest is the peak.
        limit: bytes that may be used.
        host: bytes on the host.
        host_limit: bytes of the host's memory for each rank.
        network: kind of collective -> logical bytes of a step without a refresh.
        received: bytes a rank receives for it.
        between_nodes: of these, what comes in collectives that are not within a node.
        refresh_network: the same of a refresh, beside a step's.
        refresh: a refresh, dealt out; None without LIFT.
        time: of a step.
    """

    choice: Choice
    persistent: dict[str, float]
    moments: dict[str, float]
    limit: float
    host: float
    host_limit: float
    network: dict[str, float]
    received: float
    between_nodes: float
    refresh_network: dict[str, float]
    refresh: RefreshWork | None
    time: speed.StepTime

    @property
    def peak(self) -> float:
        """Bytes at the worst moment."""
        return max(self.moments.values())

    @property
    def missing(self) -> float:
        """Bytes that are missing for it to fit, on the device and on the host; 0 where it fits."""
        return max(0.0, self.peak - self.limit) + max(0.0, self.host - self.host_limit)

    @property
    def fits(self) -> bool:
        return self.missing == 0


def setting_for(
    facts: ModelFacts,
    config: LiftConfig,
    choice: Choice,
    ranks: int,
    *,
    device_type: str = "cuda",
    matrices_alone: bool = False,
) -> Setting:
    """Return what the formulas need to know about a run; buckets and limits are those of the files that a plan writes.

    LoRA has adapters of the budget's size on the matrices that LIFT manages, and trains densely what LIFT does.

    Args:
        facts: of the model.
        config: LIFT's settings, by which the facts were found.
        choice: of the user.
        ranks: N.
        device_type: "cpu", "cuda", ...
        matrices_alone: whether full fine-tuning trains the managed matrices alone, not every parameter.
    """
    shapes, dense, others = tuple(facts.tall_shapes.values()), facts.dense, facts.others
    uses = facts.uses
    if choice.method == "full" and not matrices_alone:
        shapes += tuple((size, 1) for size in (*map(math.prod, dense), *others))
        dense, others, uses = (), (), dataclasses.replace(uses, early=0)
    trained = {
        "full": [rows * columns for rows, columns in shapes],
        "lora": [size for name, k in facts.entries.items() for size in _adapters(k, *facts.tall_shapes[name])],
        "lift": facts.entries.values(),
    }
    partitioned = choice.stage == 3
    return Setting(
        method=choice.method,
        stage=choice.stage,
        ranks=ranks,
        shapes=shapes,
        trained=tuple(trained[choice.method]),
        dense=dense,
        others=others,
        block_shape=config.block_shape,
        bucket=facts.hidden**2 if partitioned else BUCKET,
        live=LIVE if partitioned else 0,
        offload=choice.offload,
        tile=HOST_GRADIENT_TILE if device_type == "cpu" else GRADIENT_TILE,
        placement=config.index_placement,
        checkpointing=choice.checkpointing,
        uses=uses,
        layers=facts.layers,
        stacks=tuple(count > 1 for count in facts.matrices.values()),
        leaves=tuple(name in facts.leaves for name in facts.shapes),
        copy_ranks=choice.copy_ranks,
    )


def _adapters(k: int, rows: int, columns: int) -> tuple[int, int]:
    """Return the elements of LoRA's two adapters, R n and R m, which are k together."""
    first = k * columns // (rows + columns)
    return first, k - first


def activations_for(facts: ModelFacts, choice: Choice) -> Activations:
    """Return the sizes of a micro-batch."""
    adapters = 0
    if choice.method == "lora":
        adapters = sum(k // sum(facts.tall_shapes[name]) for name, k in facts.entries.items()) // facts.layers
    return Activations(
        tokens=choice.micro_batch * choice.sequence,
        hidden=facts.hidden,
        intermediate=facts.intermediate,
        key_value=facts.key_value,
        heads=facts.heads,
        layers=facts.layers,
        vocabulary=facts.vocabulary,
        checkpointing=choice.checkpointing,
        accumulation=choice.accumulation,
        adapters=adapters,
        experts=facts.experts,
    )


def estimate(facts: ModelFacts, config: LiftConfig, choice: Choice, cluster: Cluster) -> Estimate:
    """Compute what a choice comes to.

    Args:
        facts: of the model.
        config: LIFT's settings.
        choice: of the user.
        cluster: where.
    """
    setting = setting_for(facts, config, choice, cluster.ranks)
    work = activations_for(facts, choice)
    persistent = formulas.persistent(setting)
    lift = choice.method == "lift"
    refresh = refresh_work(facts, config, cluster.ranks, choice.stage) if lift else None
    moments = peak.in_all(setting, work)
    if refresh is not None:
        moments[REFRESH] = sum(persistent.values()) + refresh.memory
    network = speed.network_of_step(setting, work)
    time = speed.step_time(
        setting, work, cluster.hardware, cluster.nodes, choice.sequence, config.refresh_interval,
        float(refresh.slowest) if refresh else 0.0,
    )  # fmt: skip
    return Estimate(
        choice=choice,
        persistent=persistent,
        moments=moments,
        limit=cluster.hardware.usable_bytes,
        host=peak.host_memory(setting),
        host_limit=1e9 * cluster.host_gb / cluster.gpus_per_node,
        network=network,
        received=speed.received(network, cluster.ranks) + speed.received_in_node(network, setting.sharers),
        between_nodes=speed.received(network, cluster.ranks) if cluster.nodes > 1 else 0.0,
        refresh_network=formulas.network_refresh(setting) if lift and cluster.ranks > 1 else {},
        refresh=refresh,
        time=time,
    )


def as_json(found: Estimate) -> dict[str, Any]:
    """Return an estimate as plain values; bytes, seconds, operations."""
    choice = found.choice
    record: dict[str, Any] = {
        "method": choice.method, "stage": choice.stage, "offload_optimizer": choice.offload,
        "micro_batch": choice.micro_batch, "accumulation": choice.accumulation,
        "checkpointing": choice.checkpointing, "sequence": choice.sequence,
        "frozen_weights": "node" if choice.copy_ranks else "all",
        "fits": found.fits, "missing_bytes": found.missing, "peak_bytes": found.peak, "limit_bytes": found.limit,
        "persistent_bytes": found.persistent, "moment_bytes": found.moments, "host_bytes_per_rank": found.host,
        "network_bytes": found.network, "network_received_bytes": found.received,
        "network_received_between_nodes_bytes": found.between_nodes,
        "refresh_network_bytes": found.refresh_network,
        "seconds": {
            "step": found.time.total, "compute": found.time.compute, "network": found.time.network,
            "optimizer": found.time.optimizer, "refresh": found.time.refresh,
            "refresh_interval_steps": found.time.interval,
        },
    }  # fmt: skip
    if found.refresh is not None:
        record["refresh"] = {
            "matrices_by_rank": found.refresh.matrices, "operations_by_rank": found.refresh.operations,
            "memory_bytes": found.refresh.memory, "imbalance": found.refresh.imbalance,
        }  # fmt: skip
    return record
