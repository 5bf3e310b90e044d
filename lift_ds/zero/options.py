"""Options of DeepSpeed with which LIFT would not train what it says: refused by their key, before training.

`docs/deepspeed_options.md` has a table of what works and what is refused, made from the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from deepspeed.pipe import PipelineModule
from torch import nn


@dataclass(frozen=True)
class Refused:
    """An option that is refused.

    Args:
        key: dotted, as in the DeepSpeed file.
        turned_on: tells by the value of the key whether the option is in use.
        why: what would happen, and what to do instead.
        stages: of ZeRO, in which it is refused; none stands for all.
    """

    key: str
    turned_on: Callable[[Any], bool]
    why: str
    stages: tuple[int, ...] = ()


def _above_one(value: Any) -> bool:
    return isinstance(value, int) and value > 1


def _is_on(value: Any) -> bool:
    return value not in (None, False, {})


def _splits_matrices(block: Any) -> bool:
    if not isinstance(block, Mapping):
        return _is_on(block)
    inner = block.get("tp") or block.get("tensor_parallel") or {}
    return any(_above_one(size) for size in (block.get("autotp_size"), block.get("tp_size"), inner.get("tp_size")))


def _is_enabled(block: Any) -> bool:
    return bool(block.get("enabled", False)) if isinstance(block, Mapping) else _is_on(block)


def _has_low_precision_master(block: Any) -> bool:
    if not isinstance(block, Mapping) or _is_on(block.get("bf16_optimizer_states")):
        return False
    return any(_is_on(block.get(f"{dtype}_master_weights_and_grads")) for dtype in ("bf16", "fp16"))


_CPU_ADAM = "DeepSpeed allows it with its own DeepSpeedCPUAdam alone, and LIFT brings LiftAdamW; leave it out"

#: In the order in which they are looked at.
REFUSED = (
    Refused(
        "tensor_parallel",
        _splits_matrices,
        "tensor parallelism replaces the layers that LIFT manages and gives each rank a part of every matrix, in which "
        "no low-rank approximation of the whole can be made; use ZeRO-3 to spread a model over ranks",
    ),
    Refused(
        "expert_parallel",
        _is_enabled,
        "expert parallelism replaces the layers of the experts after LIFT is attached; use ZeRO-3 to spread them",
    ),
    Refused(
        "hybrid_engine",
        _is_enabled,
        "the hybrid engine replaces layers by its own for generation; generate with the trained model instead",
    ),
    Refused(
        "compile.deepcompile",
        _is_on,
        "DeepCompile takes over fetching and reducing from ZeRO, which LIFT relies on; use torch.compile",
    ),
    Refused(
        "zero_optimization.zenflow",
        _is_on,
        "ZenFlow updates a part of the values outside the optimizer's step, where LIFT cannot follow; leave it out: "
        "LIFT itself keeps the optimizer's states to a few percent of the model",
    ),
    Refused(
        "zero_optimization.offload_optimizer.super_offload",
        _is_on,
        "SuperOffload steps the optimizer in a process of its own, where LIFT cannot follow; "
        'use "offload_optimizer": {"device": "cpu"} without it',
    ),
    Refused("zero_optimization.offload_optimizer.ratio", lambda value: value not in (None, 1, 1.0), _CPU_ADAM),
    Refused(
        "zero_optimization.zero_quantized_weights",
        _is_on,
        "it would round the index of the trained entries, which ZeRO-3 fetches as it does weights; leave it out",
    ),
    Refused(
        "zero_optimization.zero_quantized_nontrainable_weights",
        _is_on,
        "the weights LIFT manages are frozen parameters that it writes into, so they cannot be quantised; leave it out",
    ),
    Refused(
        "zero_optimization.elastic_checkpoint",
        _is_on,
        "DeepSpeed saves such a checkpoint and cannot load it again, unless an optimizer counts its steps by group; "
        "a universal checkpoint loads on another number of ranks",
    ),
    *(
        Refused(dtype, _has_low_precision_master, f"{dtype}_master_weights_and_grads: {_CPU_ADAM}")
        for dtype in ("bf16", "fp16")
    ),
    Refused(
        "fp16.enabled",
        lambda value: value is True,
        "there DeepSpeed divides the gradients by a loss scale with which it has not multiplied them "
        "(github.com/deepspeedai/DeepSpeed/pull/8393), and steps come out too small; use stage 1, or bf16",
        stages=(0,),
    ),
    Refused(
        "datastates_ckpt",
        lambda value: value is not None and value is not False,  # {} turns it on
        "DataStates goes on writing after a save has returned, and LIFT could not tell when a checkpoint is whole; "
        "leave it out",
    ),
)


def refuse_options(ds_config: Mapping[str, Any]) -> None:
    """Refuse a DeepSpeed configuration with an option that LIFT does not support.

    Args:
        ds_config: its content.

    Raises:
        ValueError: names the key, its value, why, and what to do instead.
    """
    for option in REFUSED:
        value = _value_of(ds_config, option.key)
        if option.turned_on(value) and (not option.stages or _stage_of(ds_config) in option.stages):
            where = f" in ZeRO stage {_stage_of(ds_config)}" if option.stages else ""
            raise ValueError(
                f"{option.key}={value!r} in the DeepSpeed configuration is not supported{where}: {option.why}"
            )


def refuse_pipeline(model: nn.Module) -> None:
    """Refuse a model that DeepSpeed would train in pipeline stages.

    Raises:
        ValueError: it is a `PipelineModule`.
    """
    if any(isinstance(module, PipelineModule) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} is a PipelineModule, which is not supported: its checkpoints hold layers, and "
            "LIFT could not tell which model they belong to; use ZeRO-3 to spread a model over ranks"
        )


def _stage_of(ds_config: Mapping[str, Any]) -> int:
    block = ds_config.get("zero_optimization")
    stage = block.get("stage", 0) if isinstance(block, Mapping) else int(block is True)
    return stage if isinstance(stage, int) else 0


def _value_of(ds_config: Mapping[str, Any], key: str) -> Any:
    value: Any = ds_config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
