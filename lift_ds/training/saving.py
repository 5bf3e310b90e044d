"""Saving of the trained model as a plain one: the keys, shapes and dtypes of the base it came from."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lift_ds.model.partition import is_partitioned, partition_of
from lift_ds.runtime.logs import is_main_rank
from lift_ds.training.loading import Base

_ADAPTER = "default"
_PEFT_PREFIX = "base_model.model."
_WRAPPED = ".base_layer."


def save_plain(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str,
    original: Base,
) -> int:
    """Save a model without a trace of how it was trained; for every rank to call, rank 0 writes.

    Args:
        model: without LIFT (`detach` first); adapters of LoRA are merged, partitions of ZeRO-3 gathered.
        tokenizer: goes beside it.
        folder: where to.
        original: of the base's checkpoint; floating-point tensors held in another dtype while training are cast.

    Returns:
        The number of tensors written; 0 on the ranks that do not write.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    held_in = base.dtype
    state = plain_state(model, held_in, original.dtype)
    if not is_main_rank():
        return 0
    base.config.use_cache = original.use_cache
    base.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)
    if held_in != original.dtype:  # save_pretrained notes the dtype of the module, and loading goes by that note
        base.config.dtype = original.dtype
        base.config.save_pretrained(folder)
    assert Path(folder, "config.json").is_file(), "save_pretrained writes the configuration"
    return len(state)


@torch.no_grad()
def plain_state(model: nn.Module, held_in: torch.dtype, dtype: torch.dtype) -> dict[str, Tensor]:
    """Collect the state of the plain model in host memory, one tensor after the other.

    Args:
        model: whole, or partitioned by ZeRO-3, where every rank must call.
        held_in: dtype that was chosen for training.
        dtype: what tensors of that dtype become.

    Returns:
        Name -> tensor on rank 0, nothing on the others. Tied names share one tensor, as in the model.
    """
    adapters = {f"{name}.base_layer.weight": m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    state: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(model, PeftModel) and ".lora_" in name:
            continue
        adapter = adapters.get(name)
        with _whole([tensor, *_factors(adapter)]):
            if not is_main_rank():
                continue
            if id(tensor) not in seen:
                seen[id(tensor)] = _on_host(tensor, adapter, dtype if tensor.dtype == held_in else tensor.dtype)
        state[_plain_name(name) if isinstance(model, PeftModel) else name] = seen[id(tensor)]
    return state


def _on_host(tensor: Tensor, adapter: LoraLayer | None, dtype: torch.dtype) -> Tensor:
    value = tensor.detach()
    if adapter is not None:
        # In float32, so that merging rounds once, to the dtype of the result.
        value = _merged(value.float(), adapter)
    return value.to("cpu", dtype, copy=True).contiguous()


def _merged(weight: Tensor, adapter: LoraLayer) -> Tensor:
    """Add an adapter to its weight [m, n], float32; with DoRA, then bring each row to the length that was trained."""
    weight = weight + adapter.get_delta_weight(_ADAPTER).float()
    if _ADAPTER not in adapter.lora_magnitude_vector:
        return weight
    lengths = adapter.lora_magnitude_vector[_ADAPTER].weight.float()  # [m]
    return weight * (lengths / torch.linalg.vector_norm(weight, dim=1)).unsqueeze(1)


def _factors(adapter: Any) -> list[Tensor]:
    """The trained tensors of an adapter."""
    if adapter is None:
        return []
    magnitudes = [adapter.lora_magnitude_vector[_ADAPTER].weight] if len(adapter.lora_magnitude_vector) else []
    return [adapter.lora_A[_ADAPTER].weight, adapter.lora_B[_ADAPTER].weight, *magnitudes]


def _whole(tensors: Sequence[Tensor]) -> contextlib.AbstractContextManager[Any]:
    partitioned = [tensor for tensor in tensors if is_partitioned(tensor)]
    return partition_of(partitioned[0]).gathered(partitioned) if partitioned else contextlib.nullcontext()


def _plain_name(name: str) -> str:
    return name.removeprefix(_PEFT_PREFIX).replace(_WRAPPED, ".")
