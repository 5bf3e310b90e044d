"""What the workers have in common: DeepSpeed settings, training, and whole views of sharded tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import cases
import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

import lift_ds
from lift_ds.model.attachment import require_attachment
from lift_ds.model.weights import PrincipalWeight, is_principal
from lift_ds.zero.partitioned import gathered


def ds_config(
    stage: int,
    *,
    bf16: bool = False,
    offload: bool = False,
    accumulation: int = 1,
    check_grad_overflow: bool = False,
    **blocks: Any,
) -> dict[str, Any]:
    """A DeepSpeed configuration for the small cases; small thresholds so that ZeRO-3 really partitions."""
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": cases.GLOBAL_BATCH // dist.get_world_size() // accumulation,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": zero,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": bf16, "check_grad_overflow": check_grad_overflow},
        "steps_per_print": 10**9,
    }
    return config | blocks


def rank_rows(micro_step: int = 0, accumulation: int = 1) -> slice:
    """The rows of the global batch that this rank takes in one micro-step."""
    size = cases.GLOBAL_BATCH // dist.get_world_size() // accumulation
    first = (dist.get_rank() * accumulation + micro_step) * size
    return slice(first, first + size)


def train(
    engine: Any, kind: str, steps: Sequence[int], after_step: Callable[[int], None] | None = None, accumulation: int = 1
) -> list[float]:
    """Train and return the losses of the global batch, one a step."""
    losses = []
    for step in steps:
        total = torch.zeros(())
        for micro_step in range(accumulation):
            loss = cases.loss_of(engine, kind, step, rank_rows(micro_step, accumulation))
            engine.backward(loss)
            engine.step()
            total += loss.detach().float() / accumulation
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
        if after_step is not None:
            after_step(step)
    return losses


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters that a plain model has, whole."""
    found = {}
    for name, parameter in model.named_parameters():
        if not is_principal(name):
            with gathered([parameter]):
                found[name] = parameter.detach().clone()
    return found


def whole_index(model: nn.Module, layer: PrincipalWeight) -> AbstractContextManager[object]:
    """Make the index of a layer whole, before a driver shards it or after."""
    driver = require_attachment(model).driver
    return gathered([layer.principal.index.words]) if driver is None else driver.store.whole_index(layer)


def whole_indices(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the principal indices, whole, int64."""
    found = {}
    for name, layer in require_attachment(model).weights.items():
        with whole_index(model, layer):
            found[name] = layer.principal_index.long()
    return found


def from_first_rank(value: Any) -> Any:
    """Return on every rank what the first one has."""
    found = [value]
    dist.broadcast_object_list(found)
    return found[0]


def start() -> None:
    """Join the ranks."""
    torch.set_num_threads(1)
    # A rank that fails leaves the others waiting in a collective: not longer than this.
    deepspeed.init_distributed("gloo", timeout=timedelta(seconds=60))


def finish(folder: str, results: dict[str, Any]) -> None:
    """Save this rank's results and leave."""
    torch.save(results, Path(folder) / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


def message_of(action: Callable[[], object]) -> str:
    """The kind and message of the error an action raises, or "no error"."""
    try:
        action()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def lift_engine(model: nn.Module, config: dict[str, Any], settings: lift_ds.LiftConfig) -> Any:
    """An engine by `lift_ds.initialize`, its settings given as a "lift" block."""
    engine = lift_ds.initialize(model=model, config={**config, "lift": settings.to_dict()})[0]
    if settings.criterion == "gradient":
        lift_ds.select_by_gradients(model, cases.gradient_batches())
    return engine
