"""Trains the parity cases on every ZeRO stage; saves losses, indices after each refresh and final weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import cases
import engines
import torch
import torch.distributed as dist

import lift_ds


def run(
    kind: str,
    stage: int,
    *,
    bf16: bool = False,
    offload: bool = False,
    accumulation: int = 1,
    settings: lift_ds.LiftConfig = cases.PARITY,
    **blocks: Any,
) -> dict[str, Any]:
    """Train one case and return what the tests compare."""
    model = cases.build(kind, torch.bfloat16 if bf16 else torch.float32)
    config = engines.ds_config(stage, bf16=bf16, offload=offload, accumulation=accumulation, **blocks)
    engine = engines.lift_engine(model, config, settings)
    indices: list[dict[str, torch.Tensor]] = []

    def after_step(step: int) -> None:
        if (step + 1) % settings.refresh_interval == 0:
            indices.append(engines.whole_indices(model))

    losses = engines.train(engine, kind, range(cases.PARITY_STEPS), after_step, accumulation)
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    kernel = "fused AdamW" if inner._kernel is None else type(inner._kernel).__name__
    result = {
        "losses": losses,
        "indices": indices,
        "weights": engines.whole_weights(model),
        "kernel": kernel,
        "refreshes": [(report.step, report.matrices, report.fell_back) for report in engine.optimizer.driver.reports],
    }
    engine.destroy()
    return result


if __name__ == "__main__":
    engines.start()
    results = {f"{kind} stage {stage}": run(kind, stage) for kind, stage in cases.parity_runs(dist.get_world_size())}
    engines.finish(sys.argv[1], results)
