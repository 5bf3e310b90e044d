"""The parity case with offload, accumulation, clipping, bf16, a replicated index, odd numbers of entries, the other
solvers and criteria, and blocks refreshed in turns; saves what `parity` saves.
"""

from __future__ import annotations

import sys
from dataclasses import replace
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


if __name__ == "__main__":
    engines.start()
    results: dict[str, Any] = {"clipped plain": run_clipped_plain()}
    for stage in (2, 3):
        results[f"offload stage {stage}"] = run("llama", stage, offload=True)
        results[f"accumulation stage {stage}"] = run("llama", stage, accumulation=2)
    results["sharded"] = run("llama", 2)
    results["replicated"] = run("llama", 2, settings=replace(cases.PARITY, index_placement="replicated"))
    for stage in (2, 3):
        results[f"odd stage {stage}"] = run("matrices", stage, settings=cases.PARITY_ODD)
        for solver, settings in cases.PARITY_SOLVERS.items():
            results[f"{solver} stage {stage}"] = run("llama", stage, settings=settings)
        results[f"blocks stage {stage}"] = run("matrices", stage, settings=cases.PARITY_BLOCKS)
    for criterion, stages in cases.PARITY_CRITERIA.items():
        for stage in stages:
            settings = replace(cases.PARITY, criterion=criterion)
            results[f"{criterion} stage {stage}"] = run("llama", stage, settings=settings)
    results["other batches"] = refusal_of_other_batches()
    for stage in (0, 2, 3):
        results[f"clipped stage {stage}"] = run("llama", stage, gradient_clipping=CLIP)
    for stage in range(4):
        results[f"bf16 stage {stage}"] = run("llama", stage, bf16=True)
    results["bf16 stage 1 fp32 gradients"] = run("llama", 1, bf16=True, data_types={"grad_accum_dtype": "fp32"})
    engines.finish(sys.argv[1], results)
