"""The DeepSpeed file of a choice: what `ds_configs/` has, with the numbers of a plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lift_ds.config import LIFT_BLOCK, TRAIN_DEFAULTS_BLOCK, LiftConfig
from lift_ds.planner.estimate import BUCKET, LIVE, Choice, setting_for
from lift_ds.planner.plan import Plan

#: LIFT's settings that a file spells out even where they are the defaults.
_SPELT_OUT = ("lra_rank", "refresh_interval", "lr", "betas", "weight_decay")


def ds_file(plan: Plan, choice: Choice) -> dict[str, Any]:
    """Return the content of a DeepSpeed file.

    The block "train_defaults" has flags of launch/train.py that the plan counts on and DeepSpeed has no setting for.

    Args:
        plan: what was found.
        choice: of its rows.
    """
    content: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": choice.micro_batch,
        "gradient_accumulation_steps": choice.accumulation,
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": 1000000000,
        "wall_clock_breakdown": False,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_allow_untested_optimizer": True,
    }
    if choice.offload:
        content["zero_force_ds_cpu_optimizer"] = False
    content["zero_optimization"] = _zero(plan, choice)
    if choice.method == "lift":
        placed = {"frozen_weights": "node" if choice.copy_ranks else "all"}
        several = choice.stage == 3 and plan.cluster.nodes > 1
        content[LIFT_BLOCK] = _lift_block(plan.config) | (placed if several else {})
    content[TRAIN_DEFAULTS_BLOCK] = {
        "gradient_checkpointing": choice.checkpointing,
        "max_length": choice.sequence,
    }
    return content


def _zero(plan: Plan, choice: Choice) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": choice.stage, "overlap_comm": True, "contiguous_gradients": True}
    if choice.stage == 3:
        setting = setting_for(plan.facts, plan.config, choice, plan.cluster.ranks)
        zero |= {
            "reduce_bucket_size": setting.bucket,
            "stage3_prefetch_bucket_size": int(0.9 * setting.bucket),
            "stage3_param_persistence_threshold": 10 * plan.facts.hidden,
            "stage3_max_live_parameters": LIVE,
            "stage3_max_reuse_distance": LIVE,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    elif choice.stage:
        zero |= {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    if choice.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return zero


def _lift_block(config: LiftConfig) -> dict[str, Any]:
    settings, defaults = config.to_dict(), LiftConfig(budget_rank=1).to_dict()
    budget = "budget_rank" if config.budget_rank is not None else "density"
    return {budget: settings[budget]} | {
        name: value
        for name, value in settings.items()
        if name not in ("budget_rank", "density") and (name in _SPELT_OUT or value != defaults[name])
    }


def write_ds_file(path: Path, content: dict[str, Any]) -> None:
    """Write a DeepSpeed file, short lists on one line.

    Raises:
        ValueError: when it cannot be written.
    """
    text = json.dumps(content, indent=2)
    for value in (content.get(LIFT_BLOCK) or {}).values():
        if isinstance(value, list):
            text = text.replace(json.dumps(value, indent=2).replace("\n", "\n    "), json.dumps(value))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    except OSError as error:
        raise ValueError(f"--write {path}: cannot be written: {error.strerror}") from error
