"""One rank of a cell: trains some steps, times them, counts bytes; returns what all ranks found.

    counted     in the first repetition the engine is built and steps twice under a `Ledger`: logical bytes, peak
    warm-up     steps that nobody times
    timed       each step between two barriers; a step takes as long as on the slowest rank
    refresh     one step of LIFT that ends with a refresh

Bytes on the wire are those that /proc/net/dev counts on an interface from before the first timed step until after the
last: of every process of the node, with the headers of the packets, and the barriers between the steps.
"""

from __future__ import annotations

import os
import statistics
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.measure.counting import Ledger
from benchmarks.measure.models import build_engine, build_llama, ds_config, now, timed_step
from benchmarks.measure.ranks import process_group
from benchmarks.measure.records import Record, surroundings
from benchmarks.scaling.cells import PROBE
from benchmarks.scaling.job import Job
from lift_ds.runtime.ranks import from_all

#: Steps after those that are counted, before those that are timed.
_WARM_UP = 2
#: Steps under the ledger; the last is counted. In the first DeepSpeed and Adam make their states.
_COUNTED = 2
#: All-reduces of a probe, and the most bytes of one.
_PROBES, _PROBE_BYTES = 5, 2**25


class Worker:
    """This rank.

    Args:
        job: what to run.
    """

    def __init__(self, job: Job) -> None:
        self._cell, self._interface = job.cell, job.interface
        self._device = torch.device(job.device, int(os.environ["LOCAL_RANK"]) * (job.device == "cuda"))
        self._generator = torch.Generator().manual_seed(dist.get_rank())
        self._ledger = Ledger(job.cell.ranks)
        self._engine: Any = None

    def train(self) -> Record:
        """Build the engine, train and measure."""
        cell = self._cell
        counting = cell.repetition == 0
        found: Record = {}
        with self._ledger if counting else nullcontext():
            self._engine = self._build(refresh_after=_COUNTED * counting + _WARM_UP + cell.steps + 1)
            if counting:
                found |= self._count()
        for _ in range(_WARM_UP):
            self._step()
        before = self._wire()
        timed = [self._step() for _ in range(cell.steps)]
        dist.barrier()
        sent, received = self._since(before, cell.steps)
        found |= {
            "seconds": [max(totals) for totals in zip(*from_all([sum(parts) for parts in timed]), strict=True)],
            "phases": [statistics.median(phase) for phase in zip(*timed, strict=True)],
            "wire_sent": sent,
            "wire_received": received,
            "trained": sum(getattr(p, "ds_numel", p.numel()) for p in self._engine.parameters() if p.requires_grad),
        }
        if self._device.type == "cuda":
            found["peak_bytes"] = max(from_all(torch.cuda.max_memory_allocated()))
        if cell.trained_by == "lift":
            before = self._wire()
            self._step()
            dist.barrier()
            found["refresh_seconds"] = max(from_all(self._engine.optimizer.driver.reports[-1].seconds))
            found["refresh_wire"] = self._since(before, 1)[0] - sent
        return found

    def probe(self) -> Record:
        """Time all-reduces of as many bytes as the gradients of the model have, within limits."""
        size = min(2 * self._cell.sizes.managed, _PROBE_BYTES)
        payload = torch.zeros(size // 2, dtype=torch.bfloat16, device=self._device)
        seconds = []
        dist.all_reduce(payload)
        before = self._wire()
        for _ in range(_PROBES):
            dist.barrier()
            start = now(self._device)
            dist.all_reduce(payload)
            seconds.append(now(self._device) - start)
        dist.barrier()
        sent, received = self._since(before, _PROBES)
        seconds = [max(times) for times in zip(*from_all(seconds), strict=True)]
        crossing = 2 * (self._cell.ranks - 1) / self._cell.ranks * size
        return {
            "seconds": seconds, "wire_sent": sent, "wire_received": received,
            "measured_gbit": 8e-9 * crossing / statistics.median(seconds),
        }  # fmt: skip

    def _build(self, refresh_after: int) -> Any:
        cell, sizes = self._cell, self._cell.sizes
        model = build_llama(
            sizes.hidden, sizes.intermediate, sizes.layers, sizes.vocabulary, sizes.sequence, str(self._device)
        )
        # ZeRO-3 lets go of a layer after its use.
        more = {"overlap_comm": True, "contiguous_gradients": True}
        config = ds_config(cell.stage, cell.batch, sizes.bucket, live=0, **more)
        block: Record = {"density": sizes.density, "lra_rank": sizes.lora_rank, "refresh_interval": refresh_after}
        if cell.trained_by == "lift":
            block["frozen_weights"] = "all" if cell.method == "lift" else "node"
        return build_engine(model, cell.trained_by, sizes.lora_rank, config, block)

    def _count(self) -> Record:
        for _ in range(_COUNTED - 1):
            self._step()
        with self._ledger.window() as window:
            self._step()
        return {
            "logical_bytes": float(sum(window.logical.values())),
            "ring_bytes": statistics.mean(from_all(float(sum(window.received.values())))),
            "peak_bytes": max(from_all(window.start_bytes + window.peak_bytes)),
        }

    def _step(self) -> list[float]:
        """One optimizer step; returns the seconds of forward, backward and the rest."""
        cell = self._cell
        shape = (cell.batch, cell.sizes.sequence)
        tokens = torch.randint(0, cell.sizes.vocabulary, shape, generator=self._generator).to(self._device)
        dist.barrier()
        return timed_step(self._engine, tokens)[0]

    def _wire(self) -> tuple[int, int]:
        """Wait for all ranks; then return the bytes that this node has sent and received so far."""
        dist.barrier()
        return interface_bytes(self._interface)

    def _since(self, before: tuple[int, int], steps: int) -> tuple[float, float]:
        """Bytes a step that a node sent and received since, the mean over the nodes."""
        now = interface_bytes(self._interface)
        mine = [(after - earlier) / steps for earlier, after in zip(before, now, strict=True)]
        nodes = from_all(mine)[:: self._cell.ranks // self._cell.nodes]
        return statistics.mean(sent for sent, _ in nodes), statistics.mean(received for _, received in nodes)


def interface_bytes(name: str) -> tuple[int, int]:
    """Return the bytes that an interface has sent and received since it is up.

    Raises:
        ValueError: when this node has no such interface.
    """
    lines = Path("/proc/net/dev").read_text().splitlines()[2:]
    counts = {head.strip(): rest.split() for head, _, rest in (line.partition(":") for line in lines)}
    if name not in counts:
        raise ValueError(f"--interface {name}: {os.uname().nodename} has only {', '.join(sorted(counts))}")
    return int(counts[name][8]), int(counts[name][0])


def work(job: Job) -> Record:
    """Run this rank of a job; all its ranks call.

    Raises:
        ValueError: when this node has no such interface.
    """
    interface_bytes(job.interface)
    load = os.getloadavg()[0]
    with process_group(job.device, job.limit, job.threads):
        worker = Worker(job)
        found = worker.probe() if job.cell.method == PROBE else worker.train()
    device = torch.cuda.get_device_name() if job.device == "cuda" else "cpu"
    return {**found, **surroundings(), "device": device, "load_average": load}
