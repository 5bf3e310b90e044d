"""Which tensor of a run is what: weights, θ or adapters, gradients, index, master values, moments.

The one place of the benchmarks that knows where LIFT and DeepSpeed keep them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from lift_ds.model.weights import principal_weights
from lift_ds.planner.formulas import GRADIENTS, INDEX, MASTER, MOMENTS, TRAINED, UNMANAGED, WEIGHTS

#: Linear layers of a Llama that all methods work on, where PEFT calls the original one `base_layer`; and the stacks of
#: a Mixtral's experts.
_MANAGED = re.compile(r"\.(q|k|v|o|gate|up|down)_proj(\.base_layer)?\.weight$|\.experts\.(gate_up|down)_proj$")

#: Attributes of DeepSpeed's wrappers that hold gradients or master values, in whatever nesting.
_GRADIENTS = ("averaged_gradients", "all_grad_tensors", "grads_in_partition", "grad_partitions_flat_buffer")
_MASTERS = (
    "single_partition_of_fp32_groups",
    "fp32_partitioned_groups_flat",
    "fp32_groups",
    "fp32_groups_flat_partition",
)


def managed_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return name -> weight of the matrices that LIFT manages and LoRA adapts."""
    return {name: parameter for name, parameter in model.named_parameters() if _MANAGED.search(name)}


def index_parameters(model: nn.Module) -> list[Any]:
    """Return the parameters that are the principal indices; none without LIFT."""
    return [layer.principal.index.words for _, layer in principal_weights(model)]


def index_shards(engine: Any) -> list[Tensor]:
    """Return what holds this rank's part of the indices where ZeRO 1 and 2 shard them."""
    driver = getattr(engine.optimizer, "driver", None)
    sharded = getattr(driver.store, "_index", None) if driver is not None else None
    return [] if sharded is None else list(sharded._shards.values())


def trained_apart(model: nn.Module) -> list[Any]:
    """Return the trainable parameters beside the weights: θ or adapters; none in full fine-tuning."""
    managed = {id(parameter) for parameter in managed_weights(model).values()}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in managed]


def categories(engine: Any) -> list[tuple[str, list[Tensor]]]:
    """Return (category, its tensors) of an engine's run on this rank, the first claim of a storage being valid."""
    model, wrapper = engine.module, engine.optimizer
    managed, indices, trained = managed_weights(model).values(), index_parameters(model), trained_apart(model)
    claimed = {id(parameter) for parameter in (*managed, *indices, *trained)}
    unmanaged = [parameter for parameter in model.parameters() if id(parameter) not in claimed]
    masters = list(_held(wrapper, _MASTERS))
    gradients = [p.grad for p in (*model.parameters(), *masters) if p.grad is not None]
    gradients += [p.grad_accum for p in model.parameters() if getattr(p, "grad_accum", None) is not None]
    return [
        (WEIGHTS, _stored(managed)),
        (INDEX, [*_stored(indices), *index_shards(engine)]),
        (TRAINED, _stored(trained)),
        (UNMANAGED, _stored(unmanaged)),
        (MASTER, masters),
        (MOMENTS, list(_nested([list(state.values()) for state in wrapper.optimizer.state.values()]))),
        (GRADIENTS, [*gradients, *_held(wrapper, _GRADIENTS)]),
    ]


def _stored(parameters: Iterable[Any]) -> list[Tensor]:
    """Return what holds parameters on this rank: their shards where ZeRO-3 partitions them, and themselves."""
    parameters = list(parameters)
    return [*(p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")), *(p.detach() for p in parameters)]


def _held(wrapper: Any, names: Iterable[str]) -> Iterator[Tensor]:
    for name in names:
        yield from _nested(getattr(wrapper, name, None))


def _nested(thing: Any) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict):
        yield from _nested(list(thing.values()))
    elif isinstance(thing, (list, tuple)):
        for part in thing:
            yield from _nested(part)
