"""initialize: DeepSpeed's engine with LIFT in it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT
from torch import nn

from lift_ds.config import LIFT_BLOCK, LiftConfig, read_ds_config
from lift_ds.model.attach import attach
from lift_ds.model.attachment import attachment_of, require_attachment
from lift_ds.model.partition import is_partitioned
from lift_ds.optimizer import LiftAdamW
from lift_ds.runtime.logs import get_logger
from lift_ds.runtime.watchdog import limit_of_collectives
from lift_ds.zero.bind import bind
from lift_ds.zero.engine_checkpoints import commit_and_verify
from lift_ds.zero.options import refuse_options, refuse_pipeline
from lift_ds.zero.plain_weights import save_plain_16bit_models
from lift_ds.zero.watching import follow_engine

logger = get_logger()

AUTO = "auto"


def initialize(
    *,
    model: nn.Module,
    config: str | os.PathLike[str] | Mapping[str, Any],
    optimizer: torch.optim.Optimizer | None = None,
    resume: bool = False,
    **kwargs: Any,
) -> tuple[Any, Any, Any, Any]:
    """Like `deepspeed.initialize`, for a model that trains its principal weights.

    Attaches LIFT by the `"lift"` block where `attach` has not been called (casting the parameters to the dtype of
    training first, so that the selection, which the ranks share, is made in what is trained), builds LiftAdamW from
    the same block where no optimizer is given, fills in what the file leaves as `"auto"`, and binds write-back and
    refresh to `engine.step()`.
    `engine.save_checkpoint` commits a checkpoint with a description of the model and of every file;
    `engine.load_checkpoint` checks both before anything is loaded, takes the newest whole checkpoint where no tag is
    named, and loads universal ones too.

    Args:
        model: the model, attached or not, whole or partitioned by `deepspeed.zero.Init`.
        config: path of a DeepSpeed JSON file with a `"lift"` block, or its content.
        optimizer: the optimizer over the principal values.
        resume: select nothing, since `engine.load_checkpoint` comes next and brings the index.
        **kwargs: passed to `deepspeed.initialize` (`training_data`, `lr_scheduler`, `collate_fn`, ...).

    Returns:
        engine, optimizer, data loader, learning-rate schedule, as `deepspeed.initialize` returns them.

    Raises:
        ValueError: for a file with an `"optimizer"` block, an option that LIFT does not support or an unknown `"auto"`,
            for a pipeline, and for invalid LIFT settings.
    """
    ds_config = read_ds_config(config)
    refuse_optimizer_block(ds_config)
    refuse_options(ds_config)
    refuse_pipeline(model)
    attachment = attachment_of(model)
    _meet(kwargs, attachment.config if attachment is not None else LiftConfig.from_ds_config(ds_config))
    _attach_by(ds_config, model, resume)
    settings = require_attachment(model).config
    if optimizer is None:
        optimizer = LiftAdamW(
            model, lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
        )
    ds_config = resolve_auto(ds_config, model)
    refuse_options(ds_config)  # what "auto" became
    # LIFT's optimizer is a client optimizer to DeepSpeed, which asks for these two to be said.
    ds_config.setdefault("zero_allow_untested_optimizer", True)
    ds_config.setdefault("zero_force_ds_cpu_optimizer", False)
    engine, ds_optimizer, loader, schedule = deepspeed.initialize(
        model=model, optimizer=optimizer, config=ds_config, **kwargs
    )
    bind(model, engine.optimizer)
    commit_and_verify(engine)
    save_plain_16bit_models(engine)
    follow_engine(engine)
    return engine, ds_optimizer, loader, schedule


def _meet(arguments: Mapping[str, Any], settings: LiftConfig) -> None:
    """Join the other ranks as `deepspeed.initialize` would, before the first selection is dealt out to them."""
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(
            get_accelerator().communication_backend_name(),
            distributed_port=arguments.get("distributed_port", TORCH_DISTRIBUTED_DEFAULT_PORT),
            dist_init_required=arguments.get("dist_init_required"),
            # DeepSpeed's own limit may be shorter than what the setting allows.
            timeout=timedelta(seconds=limit_of_collectives(settings.stall_timeout)),
        )


def refuse_optimizer_block(ds_config: Mapping[str, Any]) -> None:
    """Refuse a DeepSpeed configuration that brings an optimizer of its own.

    Raises:
        ValueError: when it has an `"optimizer"` block.
    """
    if "optimizer" in ds_config:
        raise ValueError(
            f'the DeepSpeed configuration has an "optimizer" block ({ds_config["optimizer"]!r}); remove it: LIFT '
            f'brings LiftAdamW, whose settings (lr, betas, eps, weight_decay) belong into the "{LIFT_BLOCK}" block'
        )


def resolve_auto(ds_config: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Fill in the values that a DeepSpeed file leaves as "auto", as the Hugging Face Trainer does.

    Args:
        ds_config: content of the file.
        model: the model to be trained; bf16 or fp16 is enabled if its weights are in it, buckets follow its width.

    Returns:
        A copy without "auto".

    Raises:
        ValueError: for a key whose "auto" has no meaning.
    """
    width = _hidden_size(model)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    values: dict[tuple[str, ...], Any] = {
        ("train_micro_batch_size_per_gpu",): 1,
        ("gradient_accumulation_steps",): 1,
        ("train_batch_size",): None,  # follows from the other two
        ("gradient_clipping",): 1.0,
        ("bf16", "enabled"): dtype == torch.bfloat16,
        ("fp16", "enabled"): dtype == torch.float16,
        ("zero_optimization", "reduce_bucket_size"): width * width,
        ("zero_optimization", "allgather_bucket_size"): width * width,
        ("zero_optimization", "stage3_prefetch_bucket_size"): int(0.9 * width * width),
        ("zero_optimization", "stage3_param_persistence_threshold"): 10 * width,
    }
    chosen: list[str] = []
    resolved = _replace_auto(ds_config, (), values, chosen)
    if chosen:
        logger.info('"auto" in the DeepSpeed configuration became %s', ", ".join(chosen))
    return resolved


def _replace_auto(
    node: Mapping[str, Any], path: tuple[str, ...], values: Mapping[tuple[str, ...], Any], chosen: list[str]
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in node.items():
        here = (*path, key)
        if isinstance(value, Mapping) and here != (LIFT_BLOCK,):
            result[key] = _replace_auto(value, here, values, chosen)
        elif value != AUTO:
            result[key] = value
        elif here not in values:
            known = ", ".join(".".join(name) for name in values)
            raise ValueError(
                f'{".".join(here)}="auto" in the DeepSpeed configuration: give a value; "auto" works for {known}'
            )
        elif values[here] is not None:
            result[key] = values[here]
            chosen.append(f"{'.'.join(here)}={values[here]}")
    return result


def _hidden_size(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(config, "hidden_size", None)
    widest = max(weight.layout.columns for weight in require_attachment(model).weights.values())
    return int(size or widest)


def _attach_by(ds_config: Mapping[str, Any], model: nn.Module, resume: bool) -> None:
    attachment = attachment_of(model)
    if attachment is None:
        settings = LiftConfig.from_ds_config(ds_config)
        _cast_parameters(model, ds_config)
        attach(model, settings, resume=resume)
    elif LIFT_BLOCK in ds_config and LiftConfig.from_ds_config(ds_config) != attachment.config:
        logger.warning(
            'LIFT was attached with other settings than the "%s" block has; the block is not applied', LIFT_BLOCK
        )


def _cast_parameters(model: nn.Module, ds_config: Mapping[str, Any]) -> None:
    for block, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if ds_config.get(block, {}).get("enabled") is True:
            for parameter in model.parameters():
                if parameter.is_floating_point() and not is_partitioned(parameter):
                    parameter.data = parameter.data.to(dtype)
