"""What the planner predicts for a cell, on hardware calibrated by other cells.

    bandwidth of memory     bytes of the optimizer's step of full fine-tuning on one rank / its seconds
    speed of a device       operations of that run / seconds of its forward and backward, less those that its gradients
                            take in DeepSpeed's buckets at that bandwidth
    speed of a refresh      operations of LIFT's refresh on one rank / its seconds
    a link                  the rate that was given for it; where none was, what an all-reduce of the same ranks had

On a CPU the ranks of a node share its cores: with more ranks than cores each has that share of the speeds. Collectives
of gloo run beside nothing (`overlap=False`), and its reduce-scatter is an all-reduce. Nothing of the cell itself is
used, but a run on one rank is compared with what it calibrates where its method is full fine-tuning.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.measure.models import llama_config
from benchmarks.scaling.cells import PROBE, Cell, Sizes
from benchmarks.scaling.table import OK, Row, cell_of
from lift_ds.config import LiftConfig
from lift_ds.planner import peak, speed
from lift_ds.planner.estimate import Choice, activations_for, setting_for
from lift_ds.planner.formulas import Setting
from lift_ds.planner.hardware import Hardware
from lift_ds.planner.models import ModelFacts, build_on_meta, facts_of
from lift_ds.planner.peak import Activations
from lift_ds.planner.refresh_work import refresh_work

#: Rate within a node in GB/s: what ranks of one host send each other passes through its memory, and takes the time of
#: its cores, which is calibrated.
_FREE = 1e6

#: Steps between two refreshes of which a step's prediction knows nothing: refreshes are measured and predicted apart.
_APART = 10**12


@dataclass(frozen=True)
class Calibration:
    """What was measured to predict the rest by.

    Args:
        tflops: of products, 10^12 operations a second.
        bandwidth_gb: of memory in the optimizer phase, 10^9 bytes a second.
        refresh_tflops: of a refresh; None where LIFT was not run on one rank.
        links: (nodes, ranks, link) -> 10^9 bytes a second by an all-reduce.
        cores: of a node, where ranks run on its CPU; None on devices of their own.
    """

    tflops: float
    bandwidth_gb: float
    refresh_tflops: float | None
    links: dict[tuple[int, int, str], float]
    cores: int | None


@functools.lru_cache(maxsize=8)
def facts(sizes: Sizes, method: str = "lift") -> ModelFacts:
    """Return the planner's facts of a model, and LIFT's k of each matrix, or how many numbers its LoRA has."""
    config = llama_config(sizes.hidden, sizes.intermediate, sizes.layers, sizes.vocabulary, sizes.sequence)
    return facts_of("study", config, build_on_meta(config, lift_config(sizes, method)))


def lift_config(sizes: Sizes, method: str = "lift") -> LiftConfig:
    """Return LIFT's settings in a study; for a LoRA those by which LIFT would train as many numbers."""
    if method == "lora":
        return LiftConfig(budget_rank=sizes.lora_rank, lra_rank=sizes.lora_rank)
    return LiftConfig(density=sizes.density, lra_rank=sizes.lora_rank)


def setting_of(cell: Cell, device: str) -> Setting:
    """Return what the formulas need to know about a cell."""
    model, config = facts(cell.sizes, cell.method), lift_config(cell.sizes, cell.method)
    choice = Choice(cell.trained_by, cell.stage, copy_ranks=cell.copy_ranks)
    setting = setting_for(model, config, choice, cell.ranks, device_type=device, matrices_alone=True)
    return dataclasses.replace(setting, bucket=cell.sizes.bucket, live=0)


def activations_of(cell: Cell) -> Activations:
    """Return the sizes of a micro-batch of a cell."""
    return activations_for(facts(cell.sizes, cell.method), Choice(cell.trained_by, cell.stage, sequence=cell.tokens))


def calibrate(rows: Sequence[Row], sizes: Sizes) -> Calibration | None:
    """Find the speeds of devices and links by the runs on one rank and probes; None without full fine-tuning."""
    measured = [row for row in rows if row["status"] == OK and cell_of(row).sizes == sizes]
    alone = [row for row in measured if row["ranks"] == 1 and row["nodes"] == 1]
    full = _of_lowest_stage(alone, "full")
    if not full:
        return None
    cell = cell_of(full[0])
    setting = setting_of(cell, full[0]["device"])
    count = sum(speed.operations(setting, activations_of(cell), sizes.sequence).values())
    bandwidth = speed.optimizer_bytes(setting) / _median(full, "optimizer_seconds")
    forward, backward = _median(full, "forward_seconds"), _median(full, "backward_seconds")
    # Backward has twice forward's operations; a noisy run may seem to leave less.
    products = max(3 * forward, forward + backward - speed.gradient_bytes(setting) / bandwidth)
    lift = [row for row in _of_lowest_stage(alone, "lift") if row["refresh_seconds"]]
    refresh = None
    if lift:
        work = refresh_work(facts(sizes), lift_config(sizes), 1, lift[0]["stage"])
        refresh = 1e-12 * max(work.operations) / _median(lift, "refresh_seconds")
    probes: dict[tuple[int, int, str], list[Row]] = {}
    for row in measured:
        if row["method"] == PROBE:
            probes.setdefault((row["nodes"], row["ranks"], row["link"]), []).append(row)
    return Calibration(
        tflops=1e-12 * count / products,
        bandwidth_gb=1e-9 * bandwidth,
        refresh_tflops=refresh,
        links={link: _median(of_link, "measured_gbit") / 8 for link, of_link in probes.items()},
        cores=full[0]["cores"] if full[0]["device"] == "cpu" else None,
    )


def _of_lowest_stage(rows: Sequence[Row], method: str) -> list[Row]:
    found = [row for row in rows if row["method"] == method]
    return [row for row in found if row["stage"] == min(row["stage"] for row in found)]


def _median(rows: Sequence[Row], column: str) -> float:
    return statistics.median(row[column] for row in rows)


def hardware_for(cell: Cell, found: Calibration) -> Hardware | None:
    """Return the hardware of a cell; None where nothing is known of its link."""
    share = min(1.0, found.cores * cell.nodes / cell.ranks) if found.cores else 1.0
    link = cell.gbit / 8 if cell.gbit else found.links.get((cell.nodes, cell.ranks, cell.link))
    if cell.ranks == 1:
        link = 1.0  # unused
    if link is None:
        return None
    return Hardware(
        name="calibrated",
        memory_gb=1.0,  # not asked for
        tflops=share * found.tflops,
        fp32_tflops=share * (found.refresh_tflops or found.tflops),
        bandwidth_gb=share * found.bandwidth_gb,
        intra_gb=link if cell.nodes == 1 else _FREE,
        inter_gb=link,
        efficiency=1.0,
        refresh_efficiency=1.0,
        overlap=found.cores is None,
    )


def predict(cell: Cell, device: str, hardware: Hardware | None) -> dict[str, Any]:
    """Predict a cell.

    Args:
        cell: no probe.
        device: "cpu", or the name of a GPU.
        hardware: calibrated; without it only bytes are predicted.

    Returns:
        Columns of its row.
    """
    setting, work, sizes = setting_of(cell, device), activations_of(cell), cell.sizes
    sent = speed.network_of_step(setting, work)
    by_ring = speed.received(sent, cell.ranks)  # nothing of what stays within a node
    extra = _extra_of_gloo(sent, cell.ranks) if device == "cpu" else 0.0
    # Bytes pass between two nodes as between two ranks of a ring; on one node all ranks' pass through one interface.
    found: dict[str, Any] = {
        "predicted_wire_bytes": (by_ring + extra) * (cell.ranks if cell.nodes == 1 else 1),
        "predicted_logical_bytes": float(sum(sent.values())),
        "predicted_peak_bytes": float(peak.peak(setting, work)[1]),
    }
    if hardware is None:
        return found
    refresh = 0.0
    if cell.trained_by == "lift":
        refresh = float(max(refresh_work(facts(sizes), lift_config(sizes), cell.ranks, cell.stage).operations))
    time = speed.step_time(setting, work, hardware, cell.nodes, sizes.sequence, _APART, refresh)
    network = time.network + extra / hardware.link_bytes(cell.nodes)
    return found | {
        "predicted_step_seconds": time.compute + network + time.optimizer,
        "predicted_compute_seconds": time.compute,
        "predicted_network_seconds": network,
        "predicted_optimizer_seconds": time.optimizer,
        "predicted_refresh_seconds": time.refresh if cell.trained_by == "lift" else None,
    }


def _extra_of_gloo(sent: dict[str, float], ranks: int) -> float:
    """Bytes a rank receives beyond a ring's: torch's gloo makes a reduce-scatter of an all-reduce, twice the bytes."""
    size = sent.get("reduce_scatter", 0.0)
    return speed.received({"all_reduce": size}, ranks) - speed.received({"reduce_scatter": size}, ranks)


def add_predictions(rows: Sequence[Row], say: Callable[[str], None]) -> None:
    """Fill in the predictions of all rows that were measured.

    Args:
        rows: of a study, changed in place.
        say: told what cannot be predicted.
    """
    by_sizes = {sizes: calibrate(rows, sizes) for sizes in {cell_of(row).sizes for row in rows}}
    for row in rows:
        if row["status"] != OK or row["method"] == PROBE:
            continue
        cell = cell_of(row)
        found = by_sizes[cell.sizes]
        hardware = hardware_for(cell, found) if found else None
        if hardware is None:
            say(f"no time is predicted without {'the rate of its link' if found else 'one rank of full'}: {cell}")
        row |= predict(cell, row["device"], hardware)
        if found and not found.refresh_tflops:
            row["predicted_refresh_seconds"] = None
