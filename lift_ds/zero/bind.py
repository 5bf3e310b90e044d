"""bind: let LIFT run after the steps of DeepSpeed's optimizer.

engine.step()  ->  wrapper.step()      DeepSpeed: overflow check, clipping, Adam per group, gather of θ
                   Driver.step_applied()   only if the step was applied: W.flat[I] = θ, count, refresh when due
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from deepspeed import comm
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from lift_ds.model.attachment import Attachment, leave_out_of_saved_models, require_attachment
from lift_ds.model.layers import PrincipalLayer
from lift_ds.model.partition import is_partitioned
from lift_ds.model.readings import ReadModule
from lift_ds.optimizer import LiftAdamW, drive_plain
from lift_ds.refresh.driver import Driver
from lift_ds.refresh.store import PrincipalStore
from lift_ds.runtime import watchdog
from lift_ds.runtime.logs import get_logger
from lift_ds.zero.fragments import link_in_flat_order
from lift_ds.zero.leaf_modules import let_gradients_reach_leaves
from lift_ds.zero.node_shards import ALL, AUTO, NODE, NodeShards, placement_that_fits
from lift_ds.zero.nvme import FrozenShards, remove_leftovers
from lift_ds.zero.options import refuse_pipeline
from lift_ds.zero.partitioned import empty_if_partitioned, forget_second_copy
from lift_ds.zero.sharded_index import ShardedIndex
from lift_ds.zero.stores import MasterCopyStore, PartitionedParameterStore, PartitionedStateStore
from lift_ds.zero.watching import follow_training, watched_store

logger = get_logger()

# Here and not in the core: it imports the compiler, which takes longer than torch itself.
PrincipalLayer.run_uncompiled = torch.compiler.disable(PrincipalLayer.run_uncompiled)  # type: ignore[method-assign]
ReadModule.forward = torch.compiler.disable(ReadModule.forward)  # type: ignore[method-assign]


def bind(model: nn.Module, optimizer: Any) -> Driver:
    """Let LIFT run after every applied step of an optimizer; binding again changes nothing.

    For loops of one's own, after the engine is built: `lift_ds.bind(engine, engine.optimizer)`, or with Accelerate
    `lift_ds.bind(model, optimizer)` of what `accelerator.prepare` returned. `lift_ds.initialize` and `LiftCallback`
    do it by themselves. All ranks call. Collectives run only in ZeRO-3 where `frozen_weights` is not "all": hosts are
    compared, and to give each of several nodes a copy each frozen weight is gathered once.

    Args:
        model: the model LIFT is attached to, or a wrapper of it such as DeepSpeed's engine.
        optimizer: `engine.optimizer` of DeepSpeed at any ZeRO stage, or a torch optimizer of Adam's kind; Accelerate's
            wrapper of either.

    Returns:
        The driver that runs after its steps.

    Raises:
        ValueError: when LIFT is not attached, another library has changed the model since, the optimizer does not train
            the principal values, or it is of a kind whose states LIFT does not know.
    """
    attachment = require_attachment(model)
    attachment.require_trainable(model)
    refuse_pipeline(model)
    optimizer = without_accelerate(optimizer)
    leave_out_of_saved_models(model)
    driver = getattr(optimizer, "driver", None)
    if isinstance(driver, Driver) and driver.attachment is attachment:
        if not attachment.hooks:  # a LiftAdamW that drives itself
            follow_training(model, optimizer, driver)
        return driver
    _require_values(attachment, optimizer)
    _require_adam(getattr(optimizer, "optimizer", optimizer))
    _warn_if_dropped(attachment, optimizer)
    if isinstance(optimizer, torch.optim.Optimizer):
        driver, _ = drive_plain(optimizer, attachment)
        optimizer.driver = driver  # type: ignore[attr-defined]
        follow_training(model, optimizer, driver)
        return driver
    if attachment.config.frozen_weights not in (AUTO, ALL) and not isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        logger.warning(
            "frozen_weights=%r is not applied: without ZeRO-3 every rank has all weights",
            attachment.config.frozen_weights,
        )
    store = _store_for(optimizer, model, attachment)
    driver = Driver(attachment, watched_store(store), optimizer.optimizer)
    if isinstance(optimizer.optimizer, LiftAdamW):
        optimizer.optimizer.yield_to(driver)
        if _is_offloaded(optimizer):
            optimizer.optimizer.step_with(_cpu_adam(optimizer.optimizer))
    _run_after_applied_steps(optimizer, driver)
    optimizer.driver = driver
    follow_training(model, optimizer, driver)
    return driver


def _store_for(wrapper: Any, model: nn.Module, attachment: Attachment) -> PrincipalStore:
    make = STORES.get(type(wrapper))
    if make is None:
        raise ValueError(
            f"LIFT does not know where {type(wrapper).__name__} keeps its states; use ZeRO stage 0 to 3 with "
            'lift_ds.LiftAdamW, without "zenflow" and "super_offload"'
        )
    return make(wrapper, model, attachment)


def _partitioned_states(wrapper: Any, model: nn.Module, attachment: Attachment) -> PrincipalStore:
    if getattr(wrapper, "round_robin_gradients", False):
        link_in_flat_order(wrapper)
    return PartitionedStateStore(wrapper, _shard_index(wrapper, attachment), [*attachment.weights.values()])


def _shard_index(wrapper: Any, attachment: Attachment) -> ShardedIndex | None:
    """Shard the index over the ranks of stage 1 or 2, if it is to be; a checkpoint of DeepSpeed has it whole."""
    group = wrapper.real_dp_process_group[0]
    if attachment.config.index_placement == "replicated" or comm.get_world_size(group=group) == 1:
        return None
    indices = {name: weight.principal.index for name, weight in attachment.weights.items()}
    sharded = ShardedIndex(indices, group, keep=wrapper.is_gradient_accumulation_boundary)
    # DeepSpeed calls these two around saving and loading, on every rank.
    wrapper.checkpoint_event_prologue = sharded.make_whole
    wrapper.checkpoint_event_epilogue = sharded.shard_again
    return sharded


def _partitioned_parameters(wrapper: Any, model: nn.Module, attachment: Attachment) -> PrincipalStore:
    let_gradients_reach_leaves(model)
    _refuse_two_copies(wrapper, attachment)
    frozen = FrozenShards(model.parameters())
    nodes = _fill_nodes(model, _placement(wrapper, model, attachment))
    prologue, epilogue = wrapper.checkpoint_event_prologue, wrapper.checkpoint_event_epilogue

    def before_checkpoint() -> None:
        prologue()
        for parameter in filter(is_partitioned, model.parameters()):
            # "stage3_module_granularity_threshold" leaves one number in it, which nothing could be loaded into.
            empty_if_partitioned(parameter)
        remove_leftovers(wrapper)
        frozen.fetch()
        if nodes is not None:
            nodes.share_out()

    def after_checkpoint() -> None:
        if nodes is not None:
            nodes.fill_nodes()
        frozen.put_back()
        for parameter in model.parameters():  # DeepSpeed's own epilogue leaves out the frozen ones
            forget_second_copy(parameter)
        epilogue()

    wrapper.checkpoint_event_prologue, wrapper.checkpoint_event_epilogue = before_checkpoint, after_checkpoint
    return PartitionedParameterStore(wrapper)


def _refuse_two_copies(wrapper: Any, attachment: Attachment) -> None:
    frozen, size = attachment.config.frozen_weights, wrapper.zero_hpz_partition_size
    if frozen not in (AUTO, ALL) and size > 1:
        raise ValueError(
            f"frozen_weights={frozen!r} and zero_hpz_partition_size={size} would each give a node a copy of the frozen "
            "weights: leave the latter out, whose copy comes in addition to the shards"
        )


def _placement(wrapper: Any, model: nn.Module, attachment: Attachment) -> str:
    """Return where frozen weights go: the setting, but for "auto"."""
    if attachment.config.frozen_weights != AUTO:
        return attachment.config.frozen_weights
    return ALL if wrapper.zero_hpz_partition_size > 1 else placement_that_fits(model.parameters())


def _fill_nodes(model: nn.Module, placement: str) -> NodeShards | None:
    """Give each node a copy of the frozen weights, if it is to have one and there are several."""
    if placement == ALL:
        return None
    nodes = NodeShards(model.parameters(), placement)
    if nodes.copies == 1:
        logger.info("frozen_weights=%r: all ranks are on one node, so it changes nothing", nodes.setting)
        return None
    nodes.fill_nodes()
    kind = "nodes" if placement == NODE else f"groups of {nodes.sharers} ranks"
    logger.info("frozen weights: each of %d %s has a copy, a rank 1/%d of it", nodes.copies, kind, nodes.sharers)
    return nodes


def _master_copies(wrapper: Any, model: nn.Module, attachment: Attachment) -> PrincipalStore:
    return MasterCopyStore(wrapper)


#: DeepSpeed's optimizers, and how the store over each is made. Not what is derived from them: such a class may keep its
#: states elsewhere.
STORES: dict[type, Callable[[Any, nn.Module, Attachment], PrincipalStore]] = {
    FP16_UnfusedOptimizer: _master_copies,
    DeepSpeedZeroOptimizer: _partitioned_states,
    BF16_Optimizer: _partitioned_states,
    DeepSpeedZeroOptimizer_Stage3: _partitioned_parameters,
}


def _trained_parameters(optimizer: Any) -> Iterable[Tensor]:
    """The parameters of the model that an optimizer trains; DeepSpeed's groups name the half-precision ones."""
    if isinstance(optimizer, torch.optim.Optimizer):
        groups = [group["params"] for group in optimizer.param_groups]
    else:
        names = ("bit16_groups", "bf16_groups", "fp16_groups")
        groups = next((getattr(optimizer, name) for name in names if hasattr(optimizer, name)), [])
    return [parameter for group in groups for parameter in group]


def _require_values(attachment: Attachment, optimizer: Any) -> None:
    trained = {id(parameter) for parameter in _trained_parameters(optimizer)}
    missing = [name for name, weight in attachment.weights.items() if id(weight.principal_values) not in trained]
    if missing:
        raise ValueError(
            f"the optimizer {type(optimizer).__name__} does not train the principal values of {len(missing)} matrices "
            f"({missing[0]}, ...): call lift_ds.attach(model, config) before the optimizer is built"
        )


def _require_adam(optimizer: Any) -> None:
    """Check that an optimizer keeps the states that a refresh carries over: two moments of Adam, and nothing else."""
    adam = isinstance(optimizer, (torch.optim.Adam, DeepSpeedCPUAdam, FusedAdam))
    if not adam or any(group.get("amsgrad") for group in optimizer.param_groups):
        kind = f"{type(optimizer).__name__} with amsgrad" if adam else type(optimizer).__name__
        raise ValueError(
            f"the optimizer is {kind}: LIFT carries Adam's two moments from one selection to the next, and knows no "
            'other states; use lift_ds.LiftAdamW, or torch\'s AdamW (optim="adamw_torch" of a Trainer)'
        )


def _warn_if_dropped(attachment: Attachment, optimizer: Any) -> None:
    """Say so when a LiftAdamW was built for the model and another optimizer trains it."""
    built, inner = attachment.optimizer, getattr(optimizer, "optimizer", optimizer)
    if built is not None and inner is not built:
        group = inner.param_groups[0]
        logger.warning(
            "a LiftAdamW was built for this model, but %s trains it, by settings of its own: lr %g, betas %s. Under "
            "DeepSpeed a Trainer drops `optimizers=(LiftAdamW(...), ...)`. Its own AdamW trains the principal values "
            "too: build no LiftAdamW, and set learning_rate, adam_beta1 and adam_beta2 in the Trainer's arguments. "
            "Trainer, SFTTrainer and RewardTrainer also take "
            '`optimizer_cls_and_kwargs=(lift_ds.LiftAdamW, {"model": model, "lr": ...})`',
            type(inner).__name__, group["lr"], tuple(group["betas"]),
        )  # fmt: skip


def without_accelerate(optimizer: Any) -> Any:
    """Return what Accelerate's wrappers of an optimizer hold, if the program uses Accelerate."""
    kind = getattr(sys.modules.get("accelerate.optimizer"), "AcceleratedOptimizer", None)
    while kind is not None and isinstance(optimizer, kind):
        optimizer = optimizer.optimizer
    return optimizer


def _is_offloaded(wrapper: Any) -> bool:
    """Tell whether the master values live on the host by configuration."""
    return bool(getattr(wrapper, "cpu_offload", False) or getattr(wrapper, "offload_optimizer", False))


def _cpu_adam(optimizer: LiftAdamW) -> DeepSpeedCPUAdam:
    placeholder = nn.Parameter(torch.zeros(1))
    return DeepSpeedCPUAdam([placeholder], **{key: optimizer.defaults[key] for key in ("lr", "betas", "eps")})


def _run_after_applied_steps(wrapper: Any, driver: Driver) -> None:
    step = wrapper.step

    def step_and_drive(self: Any, *args: Any, **kwargs: Any) -> Any:
        with watchdog.during(f"step {driver.applied_steps + 1}", whole=True):
            driver.step_begins()
            result = step(*args, **kwargs)
            if getattr(self, "overflow", False):
                driver.step_skipped()
            else:
                driver.step_applied()
        return result

    # A bound method: learning-rate schedulers of torch rebind `optimizer.step` to its owner.
    wrapper.step = types.MethodType(step_and_drive, wrapper)
