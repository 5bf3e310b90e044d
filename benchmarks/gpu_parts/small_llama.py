"""The small Llama that the checks train, its data, and DeepSpeed's settings for it: one rank, the same every time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import lift_ds
from benchmarks.measure.models import llama_config
from benchmarks.measure.records import Record
from lift_ds.model.attachment import require_attachment
from lift_ds.zero.partitioned import gathered

VOCABULARY = 96
_HIDDEN, _INTERMEDIATE, _LAYERS = 32, 80, 2
_BATCH, _SEQUENCE = 4, 16

#: Of the weights. Of 200 seeds the one whose selections stay farthest from a tie, see `training.nearest_tie`.
SEED = 50


def build(device: str, dtype: torch.dtype = torch.float32, attention: str = "eager", layers: int = _LAYERS) -> Any:
    """Build the model; its weights do not depend on how a version of transformers draws them.

    Args:
        device: "cuda" or "cpu".
        dtype: of the weights.
        attention: by default the implementation whose backward adds up in one order, so that runs repeat to the bit.
        layers: how many.
    """
    from transformers import LlamaForCausalLM

    config = llama_config(_HIDDEN, _INTERMEDIATE, layers, VOCABULARY, _SEQUENCE, attention=attention)
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(SEED)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.dim() > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
    return model.to(device, dtype)


def tokens(step: int, device: str) -> Tensor:
    """Return the token ids [sequences, tokens] of a step."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(0, VOCABULARY, (_BATCH, _SEQUENCE), generator=generator).to(device)


def loss_of(model: Any, step: int, device: str) -> Tensor:
    """Return the loss of a model, or of an engine over it, on the data of a step."""
    batch = tokens(step, device)
    return model(input_ids=batch, labels=batch).loss


def managed_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return name of the layer -> weight of what LIFT manages, written out independently of it."""
    return {
        name.removesuffix(".weight"): parameter
        for name, parameter in model.named_parameters()
        if name.endswith("_proj.weight")
    }


def ds_config(stage: int, *, offload: tuple[str, ...] = (), **blocks: Any) -> Record:
    """Return a DeepSpeed configuration; ZeRO-3 partitions every parameter, however small.

    Args:
        stage: of ZeRO.
        offload: what is kept on the host, "optimizer" and "param".
        **blocks: further entries.
    """
    zero: Record = {"stage": stage}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}
    zero |= {f"offload_{what}": {"device": "cpu"} for what in offload}
    return {
        "train_micro_batch_size_per_gpu": _BATCH,
        "zero_optimization": zero,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        **blocks,
    }


def engine_over(model: nn.Module, config: Record, settings: lift_ds.LiftConfig) -> Any:
    """Return DeepSpeed's engine with LIFT by these settings."""
    return lift_ds.initialize(model=model, config={**config, "lift": settings.to_dict()})[0]


def train_engine(engine: Any, device: str, steps: range) -> Iterator[float]:
    """Train by an engine; yield the loss of each step when the step is done."""
    for step in steps:
        loss = loss_of(engine, step, device)
        engine.backward(loss)
        engine.step()
        yield loss.item()


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return name of the layer -> copy of its weight on the host, whole wherever ZeRO keeps it."""
    found = {}
    for name, parameter in managed_weights(model).items():
        with gathered([parameter]):
            found[name] = parameter.detach().cpu().clone()
    return found


def indices_of(model: nn.Module) -> dict[str, Tensor]:
    """Return name of the layer -> its principal index on the host, int64; of one rank alone."""
    found = {}
    for name, layer in require_attachment(model).weights.items():
        with gathered([layer.principal.index.words]):
            found[name] = layer.principal_index.long().cpu()
    return found
