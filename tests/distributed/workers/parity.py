"""Trains the parity cases on every ZeRO stage; saves losses, indices after each refresh and final weights."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import cases
import engines
import torch


def run(kind: str, stage: int, *, bf16: bool = False, offload: bool = False, steps: int = cases.PARITY_STEPS, **options: object) -> dict:
    accumulation = int(options.get("accumulation", 1))
    model = cases.build(kind, torch.bfloat16 if bf16 else torch.float32)
    config = engines.ds_config(stage, bf16=bf16, offload=offload, accumulation=accumulation)
    if offload:
        config["zero_force_ds_cpu_optimizer"] = False
    engine = engines.lift_engine(model, config, cases.PARITY)
    indices: list[dict] = []

    def after_step(step: int) -> None:
        if (step + 1) % cases.PARITY.refresh_interval == 0:
            indices.append(engines.whole_indices(model))

    losses = engines.train(engine, kind, range(steps), after_step, accumulation)
    result = {"losses": losses, "indices": indices, "weights": engines.whole_weights(model)}
    engine.destroy()
    return result


if __name__ == "__main__":
    engines.start()
    results = {}
    for kind in ("llama", "matrices"):
        for stage in range(4):
            results[f"{kind} stage {stage}"] = run(kind, stage)
    if torch.distributed.get_world_size() == 2:
        for stage in (2, 3):
            results[f"llama stage {stage} offload"] = run("llama", stage, offload=True)
            results[f"llama stage {stage} accumulation"] = run("llama", stage, accumulation=2)
        for stage in range(4):
            results[f"bf16 stage {stage}"] = run("llama", stage, bf16=True)
    engines.finish(sys.argv[1], results)
