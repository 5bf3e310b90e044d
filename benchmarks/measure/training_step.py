"""A whole training step of a small Llama, or of some layers of the size of a 7B model's, by DeepSpeed.

    full    the managed matrices, by fused AdamW; embeddings, norms and head are frozen in every method
    lora    PEFT, of the rank that trains as many numbers as LIFT
    lift    at the density of the case

Each run is an engine in fresh processes: DeepSpeed keeps parts of earlier engines alive.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from benchmarks.measure import models
from benchmarks.measure.records import Record

METHODS = ("full", "lora", "lift")

#: Steps before the timed ones.
_WARM_UP = 2


@dataclass(frozen=True)
class Case:
    """One run; sizes are those of the model, tokens per rank and step are batch * sequence."""

    method: str
    device: str
    ranks: int
    density: float
    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    batch: int
    sequence: int
    checkpointing: bool
    steps: int
    stage: int = 2

    def lora_rank(self) -> int:
        """Return the rank of the LoRA that trains nearest to the density."""
        return models.lora_rank(self.density, self.hidden, self.intermediate)


def build_engine(case: Case) -> Any:
    """Build the engine of a method over a Llama with random weights, the same on every rank."""
    # As ds_configs/lift_zero2.json. No refresh within the run: benchmarks/refresh.py times those.
    config = models.ds_config(case.stage, case.batch, 50_000_000, overlap_comm=True, contiguous_gradients=True)
    block = {"density": case.density, "lra_rank": case.lora_rank(), "refresh_interval": 10**6}
    return models.build_engine(_build_model(case), case.method, case.lora_rank(), config, block)


def _build_model(case: Case) -> Any:
    model: Any = models.build_llama(
        case.hidden, case.intermediate, case.layers, case.vocabulary, case.sequence, device=case.device
    )
    if case.checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()  # the embeddings are frozen
    return model


def measure(case: Case) -> Record:
    """Train some steps on this rank, its process group ready.

    Returns:
        Seconds of the timed steps, of their forward, backward and step, and of the processor; losses; peak bytes on a
        GPU.
    """
    engine = build_engine(case)
    # By LOCAL_RANK where there are several devices; a CUDA run has one.
    generator = torch.Generator().manual_seed(int(os.environ["RANK"]))
    phases: list[list[float]] = []
    processor: list[float] = []
    losses: list[float] = []
    for step in range(_WARM_UP + case.steps):
        if step == _WARM_UP and case.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        tokens = torch.randint(0, case.vocabulary, (case.batch, case.sequence), generator=generator).to(case.device)
        torch.distributed.barrier()
        start = time.process_time()
        spent, loss = models.timed_step(engine, tokens)
        processor.append(time.process_time() - start)
        phases.append(spent)
        losses.append(loss)
    timed = phases[_WARM_UP:]
    return {
        "seconds": [sum(spent) for spent in timed],
        "phases": [statistics.median(part) for part in zip(*timed, strict=True)],
        "processor": statistics.median(processor[_WARM_UP:]),
        "losses": losses,
        "trained": sum(p.numel() for p in engine.module.parameters() if p.requires_grad),
        "peak_bytes": torch.cuda.max_memory_allocated() if case.device == "cuda" else None,
    }


def cases_of(case: Case) -> list[Case]:
    """Return the case for every method."""
    return [replace(case, method=method) for method in METHODS]


def summarise(case: Case, runs: list[list[list[Record]]]) -> Record:
    """Put the runs of all methods together.

    Args:
        case: of any method.
        runs: of each round, of each method, what its ranks returned.
    """
    seconds: dict[str, list[float]] = {}
    found: Record = {**asdict(case), "lora_rank": case.lora_rank(), "methods": {}}
    for which, method in enumerate(METHODS):
        of_method = [round_[which] for round_ in runs]
        # A step takes as long as on the rank that is done last; of a round counts its median step.
        seconds[method] = [
            statistics.median(map(max, zip(*(rank["seconds"] for rank in ranks), strict=True))) for ranks in of_method
        ]
        found["methods"][method] = {
            "seconds": statistics.median(seconds[method]),
            "all": seconds[method],
            "forward_backward_step": [
                statistics.median(parts) for parts in zip(*(ranks[0]["phases"] for ranks in of_method), strict=True)
            ],
            "processor": statistics.median(max(rank["processor"] for rank in ranks) for ranks in of_method),
            "trained": of_method[0][0]["trained"],
            "losses": of_method[0][0]["losses"],
            "peak_bytes": of_method[-1][0]["peak_bytes"],
        }
    found["lift_against"] = {
        method: statistics.median(lift / other for lift, other in zip(seconds["lift"], seconds[method], strict=True))
        for method in METHODS
    }
    del found["method"]
    return found
