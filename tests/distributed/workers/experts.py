"""Mixtures of experts: what a step may change, resumes to the bit, what is alive in a backward.

experts.py FOLDER JOB...     few; every; whole; or a piece of a run in ZeRO-3, FIRST,LAST,RESUME,SAVE
"""

from __future__ import annotations

import gc
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import cases
import engines
import torch
from behaviour import SETTINGS, changes, resume, start
from checkpoints import STEPS, piece

from benchmarks.measure.counting import Ledger, walk_storages
from lift_ds.model.attachment import require_attachment

#: A refresh in three parts, within little memory: of the matrices of a stack, one at a time and rank.
IN_PARTS = replace(SETTINGS, refresh_parts=3, refresh_memory_gib=1.2e-4)


#: Of ZeRO: buckets that are smaller than a stack.
SMALL = {stage: {"stage": stage, "reduce_bucket_size": 1000} for stage in (2, 3)}
SMALL[3] |= {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_prefetch_bucket_size": 0}
#: So few entries of so many experts that all θ, gradients and states together are smaller than a stack.
FEW = replace(SETTINGS, budget_rank=None, density=0.02)


def alive_in_backward(stage: int, kind: str) -> dict[str, Any]:
    """The third step: how many tensors as large as a stack are alive beside the parameters, when the gradient of each
    stack is there, and after the backward and the step. What earlier runs have left in the process does not count.
    """
    gc.collect()
    left = {storage.data_ptr() for storage in walk_storages()}
    model = cases.small_experts(kind, experts=16)
    engine, _ = start(stage, model=model, settings=FEW, zero_optimization=SMALL[stage])
    engines.train(engine, kind, range(2))
    attachment = require_attachment(model)
    stacks = [weight for weight in attachment.weights.values() if weight.matrices > 1]
    least, during = min(weight.elements() for weight in stacks) * 4, []

    def large() -> int:
        held = [tensor for p in model.parameters() for tensor in (p, getattr(p, "ds_tensor", p))]
        own = left | {tensor.untyped_storage().data_ptr() for tensor in held}
        storages = {s.data_ptr(): s.nbytes() for s in (*ledger.live_storages(), *walk_storages())}
        return sum(size >= least and pointer not in own for pointer, size in storages.items())

    with Ledger(2) as ledger:
        loss, note = cases.loss_of(engine, kind, 2, engines.rank_rows()), attachment.note_backward

        def noted(weight: Any, index: Any) -> None:
            if weight.matrices > 1:
                during.append(large())
            note(weight, index)

        attachment.note_backward = noted  # type: ignore[method-assign]
        engine.backward(loss)
        del loss
        after = [large()]
        engine.step()
        after.append(large())
    dense = sum(weight.weight.grad is not None for weight in stacks)
    engine.destroy()
    return {"during": during, "after": after, "dense_gradients": dense, "stacks": len(stacks)}


def few(folder: str) -> dict[str, Any]:
    """Each kind in turn."""
    return {
        "alive gpt_oss stage 3": alive_in_backward(3, "gpt_oss"),
        "changes mixtral stage 2": changes(2, kind="mixtral", bf16=True),
        "resume qwen3_moe stage 3": resume(3, 4, folder, kind="qwen3_moe", settings=IN_PARTS),
    }


def every(folder: str) -> dict[str, Any]:
    """All kinds and stages."""
    found: dict[str, Any] = {}
    for kind in cases.EXPERTS:
        for stage in range(4):
            found[f"changes {kind} stage {stage}"] = changes(stage, kind=kind)
            found[f"resume {kind} stage {stage}"] = resume(stage, 3, folder, kind=kind, bf16=True)
            if stage >= 2:
                found[f"alive {kind} stage {stage}"] = alive_in_backward(stage, kind)
                found[f"resume {kind} offload stage {stage}"] = resume(stage, 4, folder, kind=kind, offload=True)
                found[f"resume {kind} parts stage {stage}"] = resume(stage, 4, folder, kind=kind, settings=IN_PARTS)
    return found


if __name__ == "__main__":
    engines.start()
    torch.set_num_threads(1)
    folder, results = sys.argv[1], {}
    for job in sys.argv[2:]:
        if job in ("few", "every"):
            results |= {"few": few, "every": every}[job](folder)
        elif job == "whole":
            results[job] = piece(3, range(STEPS), Path(folder), resume=None, save=None, kind="mixtral")
        else:
            first, last, resume_, save = job.split(",")
            results["piece"] = piece(
                3, range(int(first), int(last)), Path(folder) / "ranks",
                resume=resume_ or None, save=save or None, kind="mixtral",
            )  # fmt: skip
    engines.finish(folder, results)
