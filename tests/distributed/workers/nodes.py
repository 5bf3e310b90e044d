"""Frozen weights within a node: two ranks each act as one. The same runs with and without it, resumes across both."""

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

import lift_ds
from lift_ds.model.attachment import require_attachment
from lift_ds.universal import convert
from lift_ds.zero.plain_weights import plain_state_dict

SETTINGS = lift_ds.LiftConfig(
    density=0.1, lra_rank=4, refresh_interval=3, solver="gram", lr=1e-3, extra_trainable=("norm.weight",),
    keep_base=True, track_changes=True,
)  # fmt: skip
STEPS, CUT = 8, 4


#: In the place of a setting of `frozen_weights`: DeepSpeed's own copies, for two ranks each.
HPZ = "hpz"


def start(kind: str, frozen: str, **options: Any) -> Any:
    """An engine in ZeRO-3; the smallest parameters stay whole between steps."""
    offload_param, checkpointing = (options.pop(name, False) for name in ("offload_param", "checkpointing"))
    config = engines.ds_config(3, **options)
    if offload_param:
        config["zero_optimization"]["offload_param"] = {"device": "cpu"}
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 50
    if frozen == HPZ:
        frozen, config["zero_optimization"]["zero_hpz_partition_size"] = "all", 2
    dtype = torch.bfloat16 if options.get("bf16") else torch.float32
    model = cases.build(kind, dtype)
    if checkpointing:
        model.gradient_checkpointing_enable()
    return engines.lift_engine(model, config, replace(SETTINGS, frozen_weights=frozen))


def state_of(engine: Any, losses: list[float]) -> dict[str, Any]:
    model = engine.module
    changed = {one.name: (one.indices, one.values) for one in lift_ds.changed_entries(model)}
    found = {"losses": losses, "weights": engines.whole_weights(model), "indices": engines.whole_indices(model)}
    with lift_ds.base_weights(model):
        found["base"] = engines.whole_weights(model)
        # What a forward computes with, which may be another copy than what was looked at.
        with torch.no_grad():
            found["base loss"] = cases.loss_of(engine, "llama", 0, engines.rank_rows()).item()
    held = sum(p.ds_tensor.numel() for p in model.parameters() if not p.requires_grad)
    weights = require_attachment(model).weights.values()
    return found | {"changed": changed, "held": held, "managed": sum(weight.elements() for weight in weights)}


def run(kind: str, frozen: str, **options: Any) -> dict[str, Any]:
    """Some steps with two refreshes."""
    engine = start(kind, frozen, **options)
    found = state_of(engine, engines.train(engine, kind, range(STEPS)))
    engine.destroy()
    return found


def resumed(kind: str, saved_with: str, resumed_with: str, folder: str, *, universal: bool = False) -> dict[str, Any]:
    """The same run, cut; what the checkpoint's script makes of it."""
    path = f"{folder}/{saved_with}-{resumed_with}-{universal}"
    engine = start(kind, saved_with, bf16=True)
    losses = engines.train(engine, kind, range(CUT))
    engine.save_checkpoint(path, "cut")
    before = engines.whole_weights(engine.module)
    engine.destroy()
    plain = plain_state_dict(path, "cut")
    if universal and dist.get_rank() == 0:
        convert(Path(path) / "cut", Path(path) / "cut_universal")
    dist.barrier()
    engine = start(kind, resumed_with, bf16=True)
    engines.train(engine, kind, range(STEPS, STEPS + 1))  # so that there is something that loading replaces
    engine.load_checkpoint(path, "cut_universal" if universal else "cut")
    losses += engines.train(engine, kind, range(CUT, STEPS))
    found = state_of(engine, losses)
    engine.destroy()
    found["plain"] = all(torch.equal(plain[name].to(weight.dtype), weight) for name, weight in before.items())
    found["files"] = sum(file.stat().st_size for file in (Path(path) / "cut").iterdir())
    return found


def piece(folder: str, frozen: str, begin: str, end: str, load: str, save: str) -> dict[str, Any]:
    """Some steps of a run that goes on with other ranks, through universal checkpoints; each rank has whole rows."""
    cases.GLOBAL_BATCH = 12
    engine = start("llama", frozen)
    if load:
        engine.load_checkpoint(folder, load)
    losses = engines.train(engine, "llama", range(int(begin), int(end)))
    found = {"losses": losses, "weights": engines.whole_weights(engine.module)}
    found["indices"] = engines.whole_indices(engine.module)
    if save:
        engine.save_checkpoint(folder, save)
        if dist.get_rank() == 0:
            convert(Path(folder) / save, Path(folder) / f"{save}_universal")
        dist.barrier()
    engine.destroy()
    return found


def few(folder: str) -> dict[str, Any]:
    """One run within nodes and one without, and one that changes from the first way to the second."""
    found = {f"llama {frozen}": run("llama", frozen, bf16=True) for frozen in ("all", "2", HPZ)}
    return found | {"llama saved 2 loaded all": resumed("llama", "2", "all", folder)}


def every(folder: str) -> dict[str, Any]:
    """Other models, offloading, and all ways to go on."""
    found = {}
    runs: dict[str, dict[str, Any]] = {
        "llama": {"bf16": True},
        "mixtral": {},
        "gpt_oss": {"offload": True},
        "qwen3_moe": {"offload_param": True, "offload": True, "bf16": True},
    }
    for kind, options in runs.items():
        for frozen in ("all", "2"):
            found[f"{kind} {frozen}"] = run(kind, frozen, **options)
    for frozen in ("all", "2"):
        found[f"checkpointed {frozen}"] = run("llama", frozen, checkpointing=True)
    found["mixtral hpz"] = run("mixtral", HPZ)
    for saved, loaded in (("2", "2"), ("all", "2"), (HPZ, HPZ)):
        found[f"llama saved {saved} loaded {loaded}"] = resumed("llama", saved, loaded, folder)
    found["llama universal"] = resumed("llama", "2", "2", folder, universal=True)
    return found


if __name__ == "__main__":
    engines.start()
    folder, which, *arguments = sys.argv[1:]
    engines.finish(folder, {"few": few, "every": every, "piece": piece}[which](folder, *arguments))
