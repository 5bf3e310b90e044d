"""Checkpoints on real ranks: universal ones on other rank counts and stages, interrupted and failed saves, refusals.

checkpoints.py FOLDER whole|part STAGE FIRST LAST FROM TO      one piece of a run
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import cases
import engines
import torch.distributed as dist

import lift_ds
from lift_ds.universal import convert

#: Refreshes after steps 3 and 6 of 8; two groups, of which one does not decay.
SETTINGS = lift_ds.LiftConfig(
    budget_rank=4,
    lra_rank=4,
    refresh_interval=3,
    solver="svd",
    lr=1e-3,
    weight_decay=0.1,
    extra_trainable=("norm.weight",),
)
STEPS = 8


def start(stage: int, **blocks: Any) -> Any:
    """An engine over a fresh small Llama, with a schedule."""
    schedule = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 5}}
    return engines.lift_engine(cases.build("llama"), engines.ds_config(stage, scheduler=schedule, **blocks), SETTINGS)


def state_of(engine: Any) -> dict[str, Any]:
    """Weights, indices, counts and settings of a run."""
    inner = engine.optimizer.optimizer
    return {
        "weights": engines.whole_weights(engine.module),
        "indices": engines.whole_indices(engine.module),
        "applied": [group["lift_steps"] for group in inner.param_groups],
        "decay": [group["weight_decay"] for group in inner.param_groups],
        "adam": sorted({float(state["step"]) for state in inner.state.values()}),
    }


def to_universal(folder: Path, tag: str) -> None:
    """Convert on rank 0."""
    if dist.get_rank() == 0:
        convert(folder / tag, folder / f"{tag}_universal")
    dist.barrier()


def piece(stage: int, steps: range, folder: Path, *, resume: str | None, save: str | None) -> dict[str, Any]:
    """Some steps of a run, between a universal checkpoint and the next."""
    engine = start(stage)
    if resume:
        engine.load_checkpoint(folder, resume)
    losses = engines.train(engine, "llama", steps)
    if save:
        engine.save_checkpoint(folder, save)
        to_universal(folder, save)
    found = {"losses": losses, **state_of(engine)}
    engine.destroy()
    return found


def stages(folder: Path) -> list[dict[str, Any]]:
    """ZeRO-2, then 3, then 1; cut right before the first refresh and right after the second."""
    return [
        piece(2, range(2), folder, resume=None, save="stage2"),
        piece(3, range(2, 6), folder, resume="stage2_universal", save="stage3"),
        piece(1, range(6, STEPS), folder, resume="stage3_universal", save=None),
    ]


if __name__ == "__main__":
    engines.start()
    folder = Path(sys.argv[1])
    results: dict[str, Any] = {}
    for job in sys.argv[2:]:
        if job == "whole":
            results[job] = piece(2, range(STEPS), folder, resume=None, save=None)
        elif job == "stages":
            results[job] = stages(folder)
        else:
            first, last, *names = job.split(",")
            resume, save = (name or None for name in names)
            results["piece"] = piece(2, range(int(first), int(last)), folder / "ranks", resume=resume, save=save)
    engines.finish(str(folder), results)
