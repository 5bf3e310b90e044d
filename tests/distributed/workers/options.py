"""Ranks of one ZeRO stage: the same seven steps with each option of DeepSpeed that is named, and without any."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import cases
import engines
import torch

import lift_ds
from lift_ds.attachment import require_attachment

SETTINGS = lift_ds.LiftConfig(budget_rank=4, lra_rank=4, refresh_interval=3, solver="svd", lr=1e-3)


def train(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    model = cases.build("llama", dtype)
    engine = engines.lift_engine(model, config, SETTINGS)
    losses = engines.train(engine, "llama", range(7))
    found = {
        "losses": losses,
        "indices": engines.whole_indices(model),
        "weights": engines.whole_weights(model),
        "refreshes": [r.step for r in require_attachment(model).driver.reports],
    }
    engine.destroy()
    return found


if __name__ == "__main__":
    engines.start()
    results = {}
    for stage in (1, 2):
        for bf16 in (False, True):
            for offload in (False, True):
                for rr in (False, True):
                    cfg = engines.ds_config(stage, bf16=bf16, offload=offload)
                    cfg["zero_optimization"]["round_robin_gradients"] = rr
                    results[f"{stage} {bf16} {offload} {rr}"] = engines.message_of(
                        lambda: results.__setitem__(
                            f"x {stage} {bf16} {offload} {rr}", train(cfg, torch.bfloat16 if bf16 else torch.float32)
                        )
                    )
    engines.finish(sys.argv[1], results)
