"""The same five steps with each option of DeepSpeed, and without any; and what a broken state ends in."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import cases
import deepspeed
import engines
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.data_pipeline.data_routing.helper import convert_to_random_ltd, remove_random_ltd_state_dict
from option_cases import OPTIONS, RANDOM_LTD, TOGETHER, Option
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import lift_ds
from lift_ds.checkpoint import subspaces
from lift_ds.runtime.logs import get_logger

SETTINGS = lift_ds.LiftConfig(budget_rank=4, lra_rank=4, refresh_interval=2, solver="svd", lr=1e-3)


def start(
    stage: int, *options: Option, bf16: bool, compiled: bool = False, leaves: bool = False, **choices: Any
) -> Any:
    """An engine over a fresh small model."""
    config = engines.ds_config(stage, bf16=bf16, **choices)
    for option in options:
        option.apply(config)
    model = cases.build("llama", torch.bfloat16 if bf16 else torch.float32)
    if leaves:
        deepspeed.utils.set_z3_leaf_modules(model, [LlamaDecoderLayer])
    engine = engines.lift_engine(model, config, SETTINGS)
    if compiled:
        engine.compile(backend="aot_eager")
    if "data_efficiency" in config:
        convert_to_random_ltd(engine, LlamaDecoderLayer)
    return engine


def train(stage: int, *options: Option, saved: Path | None = None, **choices: Any) -> dict[str, Any]:
    """Five steps, with two refreshes; the state of the optimizer is compared with the weights at the end.

    With `saved`, a folder, the third step is followed by a save, and a new engine that loads it.
    """
    engine = start(stage, *options, **choices)
    losses = engines.train(engine, "llama", range(3))
    refreshes = [report.step for report in lift_ds.refreshes(engine)]
    if saved is not None:
        engine.save_checkpoint(saved)
        engine.destroy()
        engine = start(stage, *options, **choices)
        engine.load_checkpoint(saved)
    losses += engines.train(engine, "llama", range(3, 5))
    engine.optimizer.driver.check_state()
    found = {
        "losses": losses,
        "indices": engines.whole_indices(engine.module),
        "weights": dict(remove_random_ltd_state_dict(engines.whole_weights(engine.module))),
        "refreshes": sorted({*refreshes, *(report.step for report in lift_ds.refreshes(engine))}),
    }
    engine.destroy()
    return found


def without_options() -> dict[str, Any]:
    """The runs that those with an option are compared with."""
    return {
        f"{'bf16' if bf16 else 'fp32'} stage {stage}": train(stage, bf16=bf16)
        for bf16 in (False, True)
        for stage in (1, 2, 3)
    }


def every_option(folder: Path) -> dict[str, Any]:
    """Each option in one of its stages, and for each stage the run without any."""
    results = without_options()
    for option in OPTIONS:
        stage = option.stages[-1]
        results[option.case(stage)] = train(stage, option, bf16=option.bf16)
    for stage in (1, 2, 3):
        together = [option for option in TOGETHER if stage in option.stages]
        results[f"together stage {stage}"] = train(stage, *together, bf16=False, saved=folder / f"together{stage}")
    results |= {f"fp16 stage {stage}": half_precision(stage) for stage in (1, 2, 3)}
    auto = engines.ds_config(0) | {"fp16": {"enabled": "auto"}}
    model = cases.build("llama", torch.float16)
    results["fp16 auto"] = engines.message_of(lambda: engines.lift_engine(model, auto, SETTINGS))
    return results


def half_precision(stage: int) -> dict[str, Any]:
    """float16 with a loss scale at which the first steps overflow, and without it over the steps that did not."""
    # DeepSpeed asks oneDNN whether the processor has instructions for float16; torch computes in it on any.
    get_accelerator().is_fp16_supported = lambda: True
    found, applied, scale = fp16_run(stage, range(12), {"loss_scale": 0, "initial_scale_power": 24, "hysteresis": 1})
    expected, *_ = fp16_run(stage, applied, {"loss_scale": scale})
    return {"found": found, "expected": expected, "applied": applied}


def fp16_run(stage: int, steps: Sequence[int], scaling: dict[str, Any]) -> tuple[dict[str, Any], list[int], float]:
    """Train in float16; what was found, with the losses of the steps that were applied, those steps, the last scale."""
    config = engines.ds_config(stage) | {"fp16": {"enabled": True, **scaling}}
    model = cases.build("llama", torch.float16)
    engine = engines.lift_engine(model, config, SETTINGS)
    applied: list[int] = []

    def note(step: int) -> None:
        if engine.optimizer.driver.applied_steps > len(applied):
            applied.append(step)

    losses = engines.train(engine, "llama", steps, note)
    engine.optimizer.driver.check_state()
    found = state_of(engine) | {
        "losses": [loss for step, loss in zip(steps, losses, strict=True) if step in applied],
        "refreshes": [report.step for report in lift_ds.refreshes(engine)],
    }
    scale = float(engine.optimizer.cur_scale)
    engine.destroy()
    return found, applied, scale


class Steered(nn.Module):
    """Three layers of one size, run in an order that each rank may choose."""

    def __init__(self, order: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(3))
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        for number in self.order:
            x = x + torch.tanh(self.layers[number](x))
        return x.square().mean()


def steered(stage: int, *orders: tuple[int, ...]) -> str:
    """Three steps, a rank's layers in the order that is its own; what that ends in."""
    engine = engines.lift_engine(Steered(orders[dist.get_rank()]), engines.ds_config(stage), SETTINGS)

    def run() -> None:
        for step in range(3):
            engine.backward(engine(torch.randn(2, 16, generator=torch.Generator().manual_seed(step))))
            engine.step()

    message = engines.message_of(run)
    engine.destroy()
    return message


def idle_layer(stage: int) -> list[str]:
    """What the log says where one of three layers is not run."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    get_logger().addHandler(handler)
    assert steered(stage, (0, 2), (0, 2)) == "no error"
    get_logger().removeHandler(handler)
    return said


def broken_states(folder: Path) -> dict[str, Any]:
    """A few master values change between the second step and its refresh, or while a checkpoint loads.

    On rank 1; in stage 0, where each rank has all of them and looks for itself, on both.
    """
    results: dict[str, Any] = {}
    for stage in range(4):
        results[f"refresh stage {stage}"] = broken_refresh(stage)
    for stage in (1, 2):
        results[f"orders stage {stage}"] = steered(stage, (0, 1, 2), (0, 2, 1))
    for stage in (2, 3):
        results[f"load stage {stage}"] = broken_load(stage, folder / f"stage{stage}")
    return results


def master_values(wrapper: Any) -> torch.Tensor:
    """The master values that this rank has of the first parameters."""
    names = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups")
    first = next(getattr(wrapper, name)[0] for name in names if hasattr(wrapper, name))
    return first[0] if isinstance(first, list) else first


def change(engine: Any) -> None:
    if dist.get_rank() == 1 or engine.zero_optimization_stage() == 0:
        master_values(engine.optimizer).data[3:8] += 1.0


def state_of(engine: Any) -> dict[str, Any]:
    return {"weights": engines.whole_weights(engine.module), "indices": engines.whole_indices(engine.module)}


def broken_refresh(stage: int) -> dict[str, Any]:
    model = cases.build("llama", torch.bfloat16)
    engine = engines.lift_engine(model, engines.ds_config(stage, bf16=True), SETTINGS)
    driver, after = engine.optimizer.driver, {}
    step_applied, refresh = driver.step_applied, driver._refresh

    def broken_step() -> None:
        if driver.applied_steps == 1:
            change(engine)
        step_applied()

    driver.step_applied = broken_step
    driver._refresh = lambda *arguments: (after.update(refreshed=True), refresh(*arguments))
    before = state_of(engine)["indices"]
    message = engines.message_of(lambda: engines.train(engine, "llama", range(3)))
    after |= {"message": message, "before": before, "indices": engines.whole_indices(model)}
    engine.destroy()
    return after


def broken_load(stage: int, folder: Path) -> dict[str, Any]:
    engine = engines.lift_engine(cases.build("llama"), engines.ds_config(stage), SETTINGS)
    engines.train(engine, "llama", range(3))
    engine.save_checkpoint(str(folder))
    restore = subspaces.restore
    subspaces.restore = lambda *arguments: (restore(*arguments), change(engine))
    try:
        message = engines.message_of(lambda: engine.load_checkpoint(str(folder)))
    finally:
        subspaces.restore = restore
    engine.load_checkpoint(str(folder))  # which is as it was
    engine.destroy()
    return {"message": message}


def less_usual() -> dict[str, Any]:
    """Compiled engines, leaf modules set by a call, random-LTD, a layer that is not run, round-robin in every form."""
    results: dict[str, Any] = {f"stage {stage}": train(stage, bf16=False) for stage in (2, 3)}
    for stage in (2, 3):
        results[f"compiled stage {stage}"] = train(stage, bf16=False, compiled=True)
        results[f"random-LTD stage {stage}"] = train(stage, Option("data_efficiency", RANDOM_LTD, ()), bf16=False)
    results["leaf modules"] = train(3, bf16=False, leaves=True)
    for stage in range(4):
        results[f"idle layer stage {stage}"] = idle_layer(stage)
    return results | round_robin()


def resumed(folder: Path) -> dict[str, Any]:
    """Each option in each of its stages, at once and resumed."""
    results = without_options()
    for option in OPTIONS:
        for stage in option.stages:
            case, saved = option.case(stage), folder / f"{option.key}{stage}"
            results[case] = train(stage, option, bf16=option.bf16)
            results[f"resumed {case}"] = train(stage, option, bf16=option.bf16, saved=saved)
    return results


def round_robin() -> dict[str, Any]:
    """Round-robin gradients in every form that they have, each with the run without them."""
    (option,) = (option for option in OPTIONS if option.key.endswith("round_robin_gradients"))
    return {
        f"{'with' if options else 'without'} stage {stage} bf16 {bf16} offload {offload}": train(
            stage, *options, bf16=bf16, offload=offload
        )
        for stage in (1, 2)
        for bf16 in (False, True)
        for offload in (False, True)
        for options in ((), (option,))
    }


if __name__ == "__main__":
    engines.start()
    where = Path(sys.argv[1])
    what = {
        "every_option": lambda: every_option(where) | broken_states(where),
        "resumed": lambda: resumed(where),
        "round_robin": round_robin,
        "less_usual": less_usual,
    }
    engines.finish(sys.argv[1], what[sys.argv[2]]())
