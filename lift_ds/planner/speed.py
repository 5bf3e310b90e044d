"""How long a step takes, from operations, bytes and the speeds of devices and links.

Symbols as in `formulas` and `peak`; s the length of a sequence. Everything that is not stated in the tables below, such
as the start of kernels and of collectives, is in the efficiencies of `Hardware`, which are assumptions.
"""

from __future__ import annotations

from dataclasses import dataclass

from lift_ds.planner.formulas import (
    HIGH,
    IN_NODE,
    LOW,
    Setting,
    index_share,
    network_refresh,
    network_step,
    ring_share,
    written_back,
)
from lift_ds.planner.hardware import Hardware
from lift_ds.planner.peak import Activations

#: Bytes read and written for an entry that a rank updates: by Adam alone (gradient, master, moments and value), as
#: where the optimizer is offloaded; and by DeepSpeed 0.19's step, as counted in the tensors of its operators: gradients
#: copied to fp32, their norm, the check for overflow, clipping, Adam, values copied to bf16.
ADAM, STEP = 7 * HIGH + LOW, 74

#: Bytes of an entry's gradient on its way through DeepSpeed's buckets, counted likewise: copied in and divided on every
#: rank, copied out twice on the rank that updates it.
BUCKET_IN, BUCKET_OUT = 4 * LOW, 4 * LOW


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step.

    Args:
        compute: products and attention of all its micro-batches.
        network: what collectives take beyond what runs beside computation.
        optimizer: Adam, the gather of gradients and the write-back.
        refresh: of one refresh, on the slowest rank.
        interval: steps between two.
    """

    compute: float
    network: float
    optimizer: float
    refresh: float
    interval: int

    @property
    def total(self) -> float:
        """With the refresh spread over the steps between two."""
        return self.compute + self.network + self.optimizer + self.refresh / self.interval


def operations(setting: Setting, work: Activations, sequence: int) -> dict[str, float]:
    """Operations of a micro-batch on a rank.

    M is without the experts that a token does not pass.

                        products with weights     attention, causal (s/2 keys a query)
        forward         2 t (M + h V)             2 L t s h
        recomputation   2 t M                     2 L t s h          with activation checkpointing
        backward, x     2 t (M + h V)             4 L t s h
        backward, W     2 t M                                        LoRA: of its adapters alone, 2 t K

    Args:
        setting: the run.
        work: its activations.
        sequence: s.
    """
    tokens = work.tokens
    head = work.hidden * work.vocabulary
    layers = setting.managed - setting.uses.idle
    attention = 2.0 * work.layers * tokens * sequence * work.hidden
    forward = 2.0 * tokens * (layers + head) + attention
    again = 2.0 * tokens * layers + attention if work.checkpointing else 0.0
    trained = setting.total_trained if setting.method == "lora" else layers
    return {
        "forward": forward,
        "recomputation": again,
        "backward": 2.0 * tokens * (layers + head) + 2 * attention + 2.0 * tokens * trained,
    }


def received(sent: dict[str, float], ranks: int) -> float:
    """Bytes a rank receives in collectives of these logical sizes, by rings of all ranks."""
    return sum(size * ring_share(kind, ranks) for kind, size in sent.items() if not kind.endswith(IN_NODE))


def received_in_node(sent: dict[str, float], sharers: int) -> float:
    """Bytes a rank receives in those collectives that stay within the ranks that share a copy of the frozen weights."""
    own = {kind.removesuffix(IN_NODE): size for kind, size in sent.items() if kind.endswith(IN_NODE)}
    return received(own, sharers)


def step_time(
    setting: Setting, work: Activations, hardware: Hardware, nodes: int, sequence: int, interval: int, refresh: float
) -> StepTime:
    """Estimate an optimizer step.

        compute     operations / (speed * efficiency)
        network     bytes a rank receives / the slowest link, and those that stay in a node / its link. Beside
                    computation, where collectives overlap: ZeRO-3 all of it beside forward and backward; ZeRO 0 to 2
                    gradients and index beside backward, the values after the step beside nothing
        optimizer   `optimizer_bytes` and `gradient_bytes` / bandwidth of the memory; LIFT reads each dW and reads and
                    writes each W once more. Offloaded, Adam's bytes alone at the host's bandwidth
        refresh     operations of the rank with most / (fp32 speed * efficiency) + its collectives

    Args:
        setting: the run.
        work: the activations of a micro-batch.
        hardware: devices and links.
        nodes: how many.
        sequence: s.
        interval: steps between two refreshes.
        refresh: operations of a refresh on the rank that has most to do.
    """
    speed = 1e12 * hardware.tflops * hardware.efficiency
    counts = {part: work.accumulation * count for part, count in operations(setting, work, sequence).items()}
    compute = sum(counts.values()) / speed
    seconds = {part: count / speed for part, count in counts.items()}
    links = hardware.link_bytes(nodes), hardware.link_bytes(1)
    refreshing = 0.0
    if setting.method == "lift":
        refreshing = refresh / (1e12 * hardware.fp32_tflops * hardware.refresh_efficiency)
        refreshing += _seconds_of(network_refresh(setting), setting, links)
    network = _network_seconds(setting, work, links, seconds, hardware.overlap)
    optimizer = _optimizer_seconds(setting, hardware)
    return StepTime(compute, network, optimizer, refreshing, interval)


def network_of_step(setting: Setting, work: Activations) -> dict[str, float]:
    """Logical bytes of the collectives of an optimizer step with all its micro-batches.

    ZeRO-2 reduces the gradients of every micro-batch, ZeRO 0 and 1 once; ZeRO-3 gathers the weights for each too.
    """
    sent = network_step(setting)
    more = work.accumulation - 1
    if setting.stage == 2 and more:
        sent["all_reduce"] += more * LOW * setting.total_trained
        if "all_gather" in sent and setting.placement == "sharded":
            sent["all_gather"] += more * setting.ranks * index_share(setting)
    elif setting.stage == 3 and more:
        sent = {kind: work.accumulation * size for kind, size in sent.items()}
        if setting.method == "lift" and setting.ranks > 1:  # written back once
            for kind, size in written_back(setting).items():
                sent[kind] -= more * size
    return sent


def _seconds_of(sent: dict[str, float], setting: Setting, links: tuple[float, float]) -> float:
    """Seconds of collectives by the rates between nodes and within one."""
    between, within = links
    return received(sent, setting.ranks) / between + received_in_node(sent, setting.sharers) / within


def _network_seconds(
    setting: Setting, work: Activations, links: tuple[float, float], compute: dict[str, float], overlap: bool
) -> float:
    sent = network_of_step(setting, work)
    total = _seconds_of(sent, setting, links)
    if not overlap:
        return total
    if setting.stage == 3:
        return max(0.0, total - sum(compute.values()))
    after = LOW * setting.total_trained if setting.stage else 0.0
    late = received({"all_gather": after}, setting.ranks) / links[0]
    return max(0.0, total - late - compute["backward"] - compute["recomputation"]) + late


def optimizer_bytes(setting: Setting) -> float:
    """Bytes that a rank reads and writes in the optimizer's step."""
    return (ADAM if setting.offload else STEP) * _updated(setting)


def gradient_bytes(setting: Setting) -> float:
    """Bytes that a rank reads and writes while gradients pass through DeepSpeed's buckets."""
    return BUCKET_IN * setting.total_trained + BUCKET_OUT * _updated(setting)


def _updated(setting: Setting) -> float:
    return setting.total_trained / (setting.ranks if setting.stage else 1)


def _optimizer_seconds(setting: Setting, hardware: Hardware) -> float:
    updating = optimizer_bytes(setting) / (1e9 * (hardware.host_gb if setting.offload else hardware.bandwidth_gb))
    moved = gradient_bytes(setting)
    if setting.method == "lift":
        managed = LOW * setting.managed
        moved += managed + 2 * managed / (setting.ranks if setting.stage == 3 else 1)
    return updating + moved / (1e9 * hardware.bandwidth_gb)
