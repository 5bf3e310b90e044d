"""The parity case with offload, accumulation, clipping, bf16, a replicated index, odd numbers of entries, the other
solvers and criteria, and blocks refreshed in turns; saves what `parity` saves.

parity_variants.py FOLDER fast|slow
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import cases
import engines
import torch
import torch.distributed as dist
from parity import run

import lift_ds

CLIP = 0.05


def run_clipped_plain() -> dict[str, Any]:
    """Plain PyTorch on the whole batch, clipped by torch."""
    model = lift_ds.attach(cases.build("llama"), cases.PARITY)
    optimizer = lift_ds.LiftAdamW(model, lr=cases.PARITY.lr, weight_decay=cases.PARITY.weight_decay)
    losses = []
    for step in range(cases.PARITY_STEPS):
        loss = cases.loss_of(model, "llama", step)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], CLIP)
        assert norm > 2 * CLIP, "the case does not clip"
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"losses": losses}


def refusal_of_other_batches() -> str:
    """What is said when the ranks give different batches to measure gradients on."""
    model = lift_ds.attach(cases.build("llama"), replace(cases.PARITY, criterion="gradient"))
    lift_ds.LiftAdamW(model)
    try:
        lift_ds.select_by_gradients(model, cases.gradient_batches()[dist.get_rank() :])
    except ValueError as error:
        return str(error)
    return ""


def variants() -> dict[str, Callable[[], Any]]:
    """What makes each result."""
    found: dict[str, Callable[[], Any]] = {
        "clipped plain": run_clipped_plain,
        "sharded": partial(run, "llama", 2),
        "replicated": partial(run, "llama", 2, settings=replace(cases.PARITY, index_placement="replicated")),
        "other batches": refusal_of_other_batches,
        "bf16 stage 1 fp32 gradients": partial(run, "llama", 1, bf16=True, data_types={"grad_accum_dtype": "fp32"}),
    }
    for stage in (2, 3):
        found[f"offload stage {stage}"] = partial(run, "llama", stage, offload=True)
        found[f"accumulation stage {stage}"] = partial(run, "llama", stage, accumulation=2)
        found[f"odd stage {stage}"] = partial(run, "matrices", stage, settings=cases.PARITY_ODD)
        for solver, settings in cases.PARITY_SOLVERS.items():
            found[f"{solver} stage {stage}"] = partial(run, "llama", stage, settings=settings)
        found[f"blocks stage {stage}"] = partial(run, "matrices", stage, settings=cases.PARITY_BLOCKS)
    for criterion, stages in cases.PARITY_CRITERIA.items():
        settings = replace(cases.PARITY, criterion=criterion)
        for stage in stages:
            found[f"{criterion} stage {stage}"] = partial(run, "llama", stage, settings=settings)
    for stage in (0, 2, 3):
        found[f"clipped stage {stage}"] = partial(run, "llama", stage, gradient_clipping=CLIP)
    for stage in range(4):
        found[f"bf16 stage {stage}"] = partial(run, "llama", stage, bf16=True)
    return found


if __name__ == "__main__":
    engines.start()
    slow = sys.argv[2] == "slow"
    engines.finish(
        sys.argv[1], {name: make() for name, make in variants().items() if (name in cases.PARITY_SLOW) == slow}
    )
