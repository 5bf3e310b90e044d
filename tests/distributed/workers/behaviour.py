"""Two ranks, every ZeRO stage: what a step may change, skipped steps, partitioned loading, memory, resume, refusals."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import cases
import deepspeed
import engines
import torch
import torch.distributed as dist
from deepspeed import comm
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

import lift_ds
from lift_ds.model.attachment import require_attachment
from lift_ds.refresh.driver import Driver
from lift_ds.zero.partitioned import gathered
from lift_ds.zero.plain_weights import plain_state_dict

#: With so large a tolerance the solver stops early, and what it selects depends on where it started: a resume that lost
#: the subspaces would show.
SETTINGS = lift_ds.LiftConfig(
    budget_rank=4,
    lra_rank=4,
    refresh_interval=3,
    solver="chebyshev",
    selection_tolerance=0.3,
    lr=1e-3,
    extra_trainable=("norm.weight",),
)


def start(
    stage: int,
    *,
    kind: str = "llama",
    model: nn.Module | None = None,
    bf16: bool = False,
    settings: lift_ds.LiftConfig = SETTINGS,
    **blocks: Any,
) -> tuple[Any, nn.Module]:
    """An engine over a fresh small model."""
    if model is None:
        model = cases.build(kind, torch.bfloat16 if bf16 else torch.float32)
    return engines.lift_engine(model, engines.ds_config(stage, bf16=bf16, **blocks), settings), model


def driver_of(engine: Any) -> Driver:
    return engine.optimizer.driver


def changes(stage: int, **options: Any) -> dict[str, Any]:
    """Seven steps: which entries changed outside the principal set, and where W differs from θ after each step."""
    engine, model = start(stage, **options)
    outside, unwritten, frozen, trained = 0, 0, 0, 0
    for step in range(7):
        before, index = engines.whole_weights(model), engines.whole_indices(model)
        engines.train(engine, "llama", range(step, step + 1))
        after = engines.whole_weights(model)
        for name, layer in require_attachment(model).weights.items():
            differs = (before[layer.full_name] != after[layer.full_name]).flatten()
            trained += int(differs.sum())
            differs[index[name]] = False
            outside += int(differs.sum())
            with gathered([layer.principal_values]), engines.whole_index(model, layer):
                written = after[layer.full_name].flatten()[layer.principal_index.long()]
                unwritten += int((written != layer.principal_values).sum())
        managed = {layer.full_name for layer in require_attachment(model).weights.values()}
        frozen += sum(
            not torch.equal(before[name], after[name])
            for name in before
            if name not in managed and name != "model.norm.weight"
        )
    dense_moved = not torch.equal(after["model.norm.weight"], torch.ones_like(after["model.norm.weight"]))
    driver = driver_of(engine)
    reports = driver.reports
    engine.destroy()
    return {
        "owned": driver.plan.jobs_of(dist.get_rank()) if stage else [],
        "outside": outside, "unwritten": unwritten, "frozen": frozen, "trained": trained, "dense_moved": dense_moved,
        "refreshes": [(r.step, r.matrices, r.churn) for r in reports],
    }  # fmt: skip


def skipped(stage: int) -> dict[str, Any]:
    """Steps 1 and 3 have a gradient that is not finite on rank 0: what moved, what was counted."""
    engine, model = start(stage, bf16=True, check_grad_overflow=True)
    moved, counts = [], []
    for step in range(6):
        before, index = engines.whole_weights(model), engines.whole_indices(model)
        loss = cases.loss_of(engine, "llama", step, engines.rank_rows())
        if step in (1, 3) and dist.get_rank() == 0:
            loss = loss * float("inf")
        engine.backward(loss)
        engine.step()
        after, new_index = engines.whole_weights(model), engines.whole_indices(model)
        moved.append(
            any(not torch.equal(before[name], after[name]) for name in before)
            or any(not torch.equal(index[name], new_index[name]) for name in index)
        )
        counts.append(driver_of(engine).applied_steps)
    refreshes = [report.step for report in driver_of(engine).reports]
    engine.destroy()
    return {"moved": moved, "counts": counts, "refreshes": refreshes}


def counted_accumulation(stage: int) -> dict[str, Any]:
    """Four optimizer steps of two micro-batches each."""
    engine, _ = start(stage, accumulation=2)
    engines.train(engine, "llama", range(4), accumulation=2)
    result = {"count": driver_of(engine).applied_steps, "refreshes": [r.step for r in driver_of(engine).reports]}
    engine.destroy()
    return result


def partitioned_loading(folder: str) -> dict[str, Any]:
    """attach to a model that loaded partitioned, and to the whole one: the indices of both, and steps of training."""
    whole = lift_ds.attach(cases.build("llama"), SETTINGS)
    expected = engines.whole_indices(whole)
    path = f"{folder}/pretrained"
    if dist.get_rank() == 0:
        cases.build("llama").save_pretrained(path)
    dist.barrier()
    zero3 = HfDeepSpeedConfig(engines.ds_config(3))  # from now on, and as long as it lives, loading partitions
    partitioned = AutoModelForCausalLM.from_pretrained(path)
    del zero3
    assert partitioned.lm_head.weight.shape == (0,), "the model did not load partitioned"
    lift_ds.attach(partitioned, SETTINGS)
    found = engines.whole_indices(partitioned)
    indices = [layer.principal.index for layer in require_attachment(partitioned).weights.values()]
    held, words = sum(i.words.ds_tensor.numel() for i in indices), sum(i.word_count() for i in indices)
    engine, _ = start(3, model=partitioned)
    losses = engines.train(engine, "llama", range(7))
    engine.destroy()
    engine, _ = start(3, model=whole)
    expected_losses = engines.train(engine, "llama", range(7))
    engine.destroy()
    return {
        "found": found, "expected": expected, "losses": losses, "expected_losses": expected_losses,
        "held": held, "words": words,
    }  # fmt: skip


def live_tensors() -> list[torch.Tensor]:
    """Every tensor storage that is alive in this process, one tensor each."""
    storages: dict[int, torch.Tensor] = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and tensor.numel():
                    storages.setdefault(tensor.untyped_storage().data_ptr(), tensor)
    return list(storages.values())


def memory() -> dict[str, Any]:
    """ZeRO-2: storage sizes (elements) alive after backward and after the step that are not the model's own."""
    config = engines.ds_config(2, zero_optimization={"stage": 2, "reduce_bucket_size": 1000})
    model = cases.small_llama(hidden_size=64, intermediate_size=160)
    engine = engines.lift_engine(model, config, lift_ds.LiftConfig(density=0.02, lra_rank=4, refresh_interval=3))
    engines.train(engine, "llama", range(2))
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    loss = cases.loss_of(engine, "llama", 2, engines.rank_rows())
    engine.backward(loss)
    del loss

    def foreign() -> list[int]:
        gc.collect()
        return sorted(
            t.untyped_storage().nbytes() // 4 for t in live_tensors() if t.untyped_storage().data_ptr() not in own
        )

    after_backward = foreign()
    engine.step()
    layers = require_attachment(model).weights.values()
    result = {
        "after_backward": after_backward,
        "after_step": foreign(),
        "weights": sorted(layer.weight.numel() for layer in layers),
        "entries": require_attachment(model).entries(),
        "dense_gradients": sum(layer.weight.grad is not None for layer in layers),
    }
    engine.destroy()
    return result


def index_traffic(stage: int, placement: str, accumulation: int) -> dict[str, Any]:
    """Four steps and their refresh: gathers of int32 words a step, words held between steps, gathers begun ahead."""
    settings = replace(SETTINGS, index_placement=placement)
    model = cases.build("llama")
    engine = engines.lift_engine(model, engines.ds_config(stage, accumulation=accumulation), settings)
    layers = require_attachment(model).weights
    gathers, ahead = [], []
    real = comm.all_gather_into_tensor

    def counted(output: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        gathers.append(output.dtype == torch.int32)
        return real(output, *arguments, **options)

    sharded = engine.optimizer.driver.store._index
    for layer in layers.values():
        layer.principal.index.register_forward_hook(lambda *_: ahead.append(len(sharded._in_flight) if sharded else 0))
    comm.all_gather_into_tensor = counted
    try:
        a_step = []
        for step in range(4):
            gathers.clear(), ahead.clear()
            engines.train(engine, "llama", range(step, step + 1), accumulation=accumulation)
            a_step.append({"gathers": sum(gathers), "ahead": sum(ahead), "uses": len(ahead)})
    finally:
        comm.all_gather_into_tensor = real
    indices = [layer.principal.index for layer in layers.values()]
    result = {
        "steps": a_step,
        "layers": len(layers),
        "whole": sum(index.words.numel() for index in indices),
        "words": sum(index.word_count() for index in indices),
        "shards": 0 if sharded is None else sum(shard.numel() for shard in sharded._shards.values()),
    }
    engine.destroy()
    return result


def saved_models(stage: int, bf16: bool, folder: str) -> dict[str, Any]:
    """What each way of saving gives of a model in training; and its weights, with master values in float32."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    engine, model = start(stage, bf16=bf16, zero_optimization=zero)
    engines.train(engine, "llama", range(4))
    found: dict[str, Any] = {"weights": engines.whole_weights(model)}
    engine.save_16bit_model(f"{folder}/16bit{stage}")
    found["refused"] = engines.message_of(lambda: engine.save_16bit_model(folder, exclude_frozen_parameters=True))
    if stage < 3 and dist.get_rank() == 0:
        model.save_pretrained(f"{folder}/saved{stage}")
    if stage > 0:
        engine.save_checkpoint(f"{folder}/converted{stage}")
        masters = found["weights"] | {"model.norm.weight": safe_get_full_fp32_param(model.model.norm.weight)}
        for name, layer in require_attachment(model).weights.items():
            with engines.whole_index(model, layer):
                index = layer.principal_index.long()
            weight = masters[f"{name}.weight"] = found["weights"][f"{name}.weight"].float()
            weight.view(-1)[index] = safe_get_full_fp32_param(layer.principal_values)
        found["masters"] = masters
    dist.barrier()
    found["16bit"] = torch.load(f"{folder}/16bit{stage}/pytorch_model.bin")
    if stage < 3:
        found["save_pretrained"] = load_file(f"{folder}/saved{stage}/model.safetensors")
    if stage > 0:
        found["converted"] = plain_state_dict(f"{folder}/converted{stage}")
    engine.destroy()
    return found


def converted_by_script(folder: str) -> dict[str, torch.Tensor]:
    """What the script beside a checkpoint of stage 3 writes, started as one does."""
    if dist.get_rank() == 0:
        source, target = f"{folder}/converted3", f"{folder}/script"
        command = [sys.executable, f"{source}/zero_to_fp32.py", source, target, "--safe_serialization"]
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        subprocess.run(command, check=True, timeout=120, env=environment)
    dist.barrier()
    return load_file(f"{folder}/script/model.safetensors")


def resume(stage: int, cut: int, folder: str, *, in_place: bool = False, **options: Any) -> dict[str, Any]:
    """Seven steps at once, and with a save and a load after `cut` of them.

    The load goes into a new engine, or back into the one that saved and went on.
    """
    engine, model = start(stage, **options)
    losses = engines.train(engine, "llama", range(7))
    expected = {"losses": losses, "weights": engines.whole_weights(model), "indices": engines.whole_indices(model)}
    engine.destroy()

    path = tempfile.mkdtemp(dir=folder) if dist.get_rank() == 0 else ""
    path = engines.from_first_rank(path)
    engine, model = start(stage, **options)
    losses = engines.train(engine, "llama", range(cut))
    engine.save_checkpoint(path)
    if in_place:
        engines.train(engine, "llama", range(20, 24))
    else:
        engine.destroy()
        engine, model = start(stage, **options)
    engine.load_checkpoint(path)
    losses += engines.train(engine, "llama", range(cut, 7))
    found = {"losses": losses, "weights": engines.whole_weights(model), "indices": engines.whole_indices(model)}
    engine.destroy()
    return {"expected": expected, "found": found}


def shipped_files() -> dict[str, dict[str, Any]]:
    """Each file of ds_configs as it is, by `lift_ds.initialize`: losses of three steps, budget and offloading."""
    found = {}
    for path in sorted((Path(__file__).parents[3] / "ds_configs").glob("*.json")):
        model = cases.build("llama")
        engine, *_ = lift_ds.initialize(model=model, config=path)
        losses = []
        for step in range(3):
            loss = cases.loss_of(engine, "llama", step, engines.rank_rows())
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        inner = engine.optimizer.optimizer
        found[path.stem] = {
            "losses": losses,
            "stage": engine.zero_optimization_stage(),
            "density": require_attachment(model).config.density,
            "cpu_kernel": inner._kernel is not None,
        }
        engine.destroy()
    return found


def refusals(folder: str) -> dict[str, str]:
    """Runs in which LIFT would not be active, or would start from something else."""
    found = {}

    def unbound() -> None:
        model = lift_ds.attach(cases.build("llama"), SETTINGS)
        optimizer = lift_ds.LiftAdamW(model)
        config = engines.ds_config(2, zero_allow_untested_optimizer=True)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        engines.train(engine, "llama", range(1))

    def foreign_optimizer() -> None:
        model = lift_ds.attach(cases.build("llama"), SETTINGS)
        optimizer = torch.optim.AdamW([model.model.norm.weight.requires_grad_(True)])
        lift_ds.initialize(model=model, optimizer=optimizer, config=engines.ds_config(2))

    def two_copies() -> None:
        zero = {"stage": 3, "zero_hpz_partition_size": 2}
        start(3, zero_optimization=zero, settings=replace(SETTINGS, frozen_weights="2"))

    def other_model() -> None:
        engine, _ = start(2)
        engine.save_checkpoint(f"{folder}/small")
        engine, _ = start(2, model=cases.small_llama(intermediate_size=96))
        engine.load_checkpoint(f"{folder}/small")

    def nothing_saved() -> None:
        engine, _ = start(2)
        engine.load_checkpoint(f"{folder}/empty")

    def not_finite() -> None:
        engine, model = start(2)
        engines.train(engine, "llama", range(1))
        if dist.get_rank() == 1:  # who owns the matrix or not: all ranks are to stop
            for layer in require_attachment(model).weights.values():
                layer.weight.data[3, 5] = float("nan")
        driver = driver_of(engine)
        driver._refresh(3, driver.plan.due(3))

    for action in (unbound, foreign_optimizer, two_copies, other_model, nothing_saved, not_finite):
        found[action.__name__] = engines.message_of(action)
    return found


if __name__ == "__main__":
    engines.start()
    folder = sys.argv[1]
    results: dict[str, Any] = {"memory": memory()}  # first: DeepSpeed keeps parts of earlier engines alive
    for stage in range(4):
        results[f"changes stage {stage}"] = changes(stage)
    for stage in range(4):
        results[f"changes bf16 stage {stage}"] = changes(stage, bf16=True)
        results[f"accumulation stage {stage}"] = counted_accumulation(stage)
    for stage in (1, 2, 3):
        results[f"skipped stage {stage}"] = skipped(stage)
    for stage in range(4):
        for cut in {2: (2, 4), 3: (3, 4)}.get(stage, (4,)):
            results[f"resume stage {stage} after {cut}"] = resume(stage, cut, folder)
    for stage in (2, 3):
        results[f"resume offload stage {stage}"] = resume(stage, 4, folder, offload=True)
    for stage in (1, 3):
        results[f"resume in place stage {stage}"] = resume(stage, 4, folder, in_place=True)
    for stage in (1, 2):
        for accumulation in (1, 2):
            results[f"index sharded stage {stage} accumulation {accumulation}"] = index_traffic(
                stage, "sharded", accumulation
            )
    results["index replicated"] = index_traffic(2, "replicated", 1)
    for stage, bf16 in ((0, False), (0, True), (2, True), (3, True)):
        results[f"saved stage {stage} bf16 {bf16}"] = saved_models(stage, bf16, f"{folder}/{bf16}")
    results["converted by script"] = converted_by_script(f"{folder}/True")
    results["resume bf16 stage 1"] = resume(1, 4, folder, bf16=True)
    results["partitioned loading"] = partitioned_loading(folder)
    results["shipped files"] = shipped_files()
    results["refusals"] = refusals(folder)
    engines.finish(folder, results)
