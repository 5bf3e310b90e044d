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

import lift_ds
from benchmarks.measure import models
from benchmarks.measure.holdings import managed_weights
from benchmarks.measure.records import Record
from benchmarks.measure.spectra import matrix
from lift_ds.planner.estimate import BUCKET, LIVE

METHODS = ("full", "lora", "lift")

#: Steps before the timed ones.
_WARM_UP = 2

#: A refresh that no run reaches.
_NEVER = 10**6


@dataclass(frozen=True)
class Case:
    """One run; sizes are those of the model, tokens per rank and step are batch * sequence.

    `lora` is the rank of the LoRA, 0 for the one that trains nearest to the density; `key_value_heads` 0 for as many as
    the queries have. With `refresh` one more step is done, which has a refresh. With `trained_like` the weights have
    the spectra of trained ones, which decide how long it takes to select in them.
    """

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
    lora: int = 0
    key_value_heads: int = 0
    refresh: bool = False
    trained_like: bool = False

    def lora_rank(self) -> int:
        """Return the rank of the LoRA."""
        return self.lora or models.lora_rank(self.density, self.hidden, self.intermediate)

    def lift_block(self) -> Record:
        """Return LIFT's settings; its low-rank approximation has the rank of the LoRA."""
        interval = _WARM_UP + self.steps + 1 if self.refresh else _NEVER
        return {"density": self.density, "lra_rank": self.lora_rank(), "refresh_interval": interval}


def build_engine(case: Case) -> Any:
    """Build the engine of a method over a Llama with random weights, the same on every rank."""
    return models.build_engine(_build_model(case), case.method, case.lora_rank(), ds_config(case), case.lift_block())


def ds_config(case: Case) -> Record:
    """Return what ds_configs/ and the planner write for a stage."""
    zero: Record = {"overlap_comm": True, "contiguous_gradients": True}
    bucket = BUCKET
    if case.stage == 3:
        bucket = case.hidden**2
        zero |= {
            "stage3_prefetch_bucket_size": int(0.9 * bucket),
            "stage3_param_persistence_threshold": 10 * case.hidden,
            "stage3_max_live_parameters": LIVE,
            "stage3_max_reuse_distance": LIVE,
        }
    return models.ds_config(case.stage, case.batch, bucket, **zero)


def _build_model(case: Case) -> Any:
    model: Any = models.build_llama(
        case.hidden, case.intermediate, case.layers, case.vocabulary, case.sequence, case.device, case.key_value_heads
    )
    if case.trained_like:
        _give_trained_spectra(model, case.lora_rank())
    _release_unused(case)
    if case.checkpointing:
        model.gradient_checkpointing_enable()
    if case.checkpointing or case.layers == 1:  # one layer stands for those in the middle, whose input has a gradient
        model.enable_input_require_grads()  # the embeddings are frozen
    return model


@torch.no_grad()
def _give_trained_spectra(model: Any, rank: int) -> None:
    """Set the managed weights; those of a shape are one matrix, its rows and columns in an order of their own."""
    made: dict[torch.Size, torch.Tensor] = {}
    for weight in managed_weights(model).values():
        rows, columns = weight.shape
        if weight.shape not in made:
            made[weight.shape] = matrix("trained-like", rows, columns, rank, dtype=weight.dtype, device=weight.device)
        orders = [torch.randperm(side, device=weight.device) for side in (rows, columns)]
        weight.copy_(made[weight.shape][orders[0]][:, orders[1]])


def measure(case: Case) -> Record:
    """Train some steps on this rank, its process group ready.

    Returns:
        Seconds of the timed steps, of their forward, backward and step, and of the processor; losses; on a GPU peak
        bytes; seconds to build the engine; the refresh where there is one.
    """
    start = time.perf_counter()
    engine = build_engine(case)
    _release_unused(case)
    built = time.perf_counter() - start
    # By LOCAL_RANK where there are several devices; a CUDA run has one.
    generator = torch.Generator().manual_seed(int(os.environ["RANK"]))
    phases: list[list[float]] = []
    processor: list[float] = []
    losses: list[float] = []
    for step in range(_WARM_UP + case.steps):
        if step == _WARM_UP:
            _forget_peak(case)
        tokens = _tokens(case, generator)
        torch.distributed.barrier()
        start = time.process_time()
        spent, loss = models.timed_step(engine, tokens)
        processor.append(time.process_time() - start)
        phases.append(spent)
        losses.append(loss)
    timed = phases[_WARM_UP:]
    return {
        "seconds_of_steps": [sum(spent) for spent in timed],
        "phases": [statistics.median(part) for part in zip(*timed, strict=True)],
        "processor": statistics.median(processor[_WARM_UP:]),
        "losses": losses,
        "trained": sum(p.numel() for p in engine.module.parameters() if p.requires_grad),
        "peak_bytes": _peak(case),
        "build_seconds": built,
        "refresh": _refresh(engine, case, _tokens(case, generator)) if case.refresh else None,
    }


def _tokens(case: Case, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, case.vocabulary, (case.batch, case.sequence), generator=generator).to(case.device)


def _release_unused(case: Case) -> None:
    """Give back what building took for a while, so that it does not lie between the blocks of training."""
    if case.device == "cuda":
        torch.cuda.empty_cache()


def _forget_peak(case: Case) -> None:
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak(case: Case) -> int | None:
    return torch.cuda.max_memory_allocated() if case.device == "cuda" else None


def _refresh(engine: Any, case: Case, tokens: torch.Tensor) -> Record:
    """Do the step that has a refresh; return what the refresh took, and the peak of the step on a GPU."""
    _forget_peak(case)
    models.step(engine, tokens)
    (report,) = lift_ds.refreshes(engine.module)
    return {
        "seconds": report.seconds, "selection_seconds": max(report.selection_seconds), "matrices": report.matrices,
        "churn": report.churn, "fell_back": report.fell_back, "estimate": report.estimate, "peak_bytes": _peak(case),
    }  # fmt: skip


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
            statistics.median(map(max, zip(*(rank["seconds_of_steps"] for rank in ranks), strict=True)))
            for ranks in of_method
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
