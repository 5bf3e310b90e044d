"""Pins that FSDP and PEFT on a model with LIFT, in either order, are refused at once and by name, with what to use
instead: where they are not, FSDP2 ended in a crash of the process, and PEFT in a training that moved no weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from cases import small_llama, token_batch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import lift_ds
from lift_ds.refresh.store import put_values

CONFIG = lift_ds.LiftConfig(budget_rank=2, lra_rank=2)


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    """FSDP needs a process group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard_1(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def shard_2(model: nn.Module) -> nn.Module:
    return fully_shard(model)


def shard_2_by_layers(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


SHARDS = [shard_1, shard_2, shard_2_by_layers]


@pytest.mark.parametrize("shard", SHARDS)
def test_fsdp_on_an_attached_model_is_refused_at_once(shard: Callable[[nn.Module], nn.Module]) -> None:
    """By the call of FSDP itself, whether or not an optimizer has been built."""
    for with_optimizer in (False, True):
        model = lift_ds.attach(small_llama(), CONFIG)
        if with_optimizer:
            lift_ds.LiftAdamW(model)
        with pytest.raises(ValueError, match=r"FSDP was given a model that LIFT is attached to.*use DeepSpeed.*ZeRO-3"):
            shard(model)


@pytest.mark.parametrize("shard", SHARDS)
def test_attaching_to_a_model_that_fsdp_has_sharded_is_refused(shard: Callable[[nn.Module], nn.Module]) -> None:
    model = shard(small_llama())
    with pytest.raises(ValueError, match=r"a model that FSDP has sharded.*use DeepSpeed"):
        lift_ds.attach(model, CONFIG)


def test_a_dtensor_reaches_no_kernel() -> None:
    """The last line: a weight that became one in a way that nobody foresaw."""
    layer = nn.Linear(8, 4, bias=False)
    lift_ds.attach(nn.Sequential(layer), CONFIG)
    sharded = fully_shard(nn.Sequential(nn.Linear(8, 4, bias=False)))[0].weight
    with pytest.raises(ValueError, match=r"FSDP was given a model"):
        put_values(sharded, layer.principal.index.compact(), layer.principal.values)


def test_an_optimizer_for_a_model_that_was_sharded_past_the_first_check_is_refused() -> None:
    model = lift_ds.attach(small_llama(), CONFIG)
    fully_shard(model.lm_head)  # a layer that LIFT does not manage
    with pytest.raises(ValueError, match=r"FSDP was given a model that LIFT is attached to"):
        lift_ds.LiftAdamW(model)


def adapted(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


def test_attaching_to_a_peft_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a model with adapters of PEFT.*merge_and_unload"):
        lift_ds.attach(adapted(small_llama()), CONFIG)


def test_an_optimizer_for_an_attached_model_with_adapters_is_refused() -> None:
    model = adapted(lift_ds.attach(small_llama(), CONFIG))
    with pytest.raises(ValueError, match=r"get_peft_model after lift_ds\.attach.*lift_ds\.detach"):
        lift_ds.LiftAdamW(model)
    with pytest.raises(ValueError, match=r"get_peft_model after lift_ds\.attach"):
        lift_ds.bind(model, torch.optim.AdamW(p for p in model.parameters() if p.requires_grad))


def test_training_an_attached_model_with_adapters_is_refused_whatever_the_optimizer() -> None:
    """Eight steps moved no weight and said nothing; now the first forward says it."""
    model = lift_ds.attach(small_llama(), CONFIG)
    lift_ds.LiftAdamW(model)
    wrapped = adapted(model)
    with pytest.raises(RuntimeError, match=r"not active: .* Adapters of PEFT"):
        wrapped(input_ids=token_batch(0), labels=token_batch(0))
    wrapped.eval()
    wrapped(input_ids=token_batch(0))  # an evaluation trains nothing anyway


def test_a_tuned_model_takes_adapters_after_detach() -> None:
    model = adapted(lift_ds.detach(lift_ds.attach(small_llama(), CONFIG)))
    model(input_ids=token_batch(0), labels=token_batch(0)).loss.backward()


def test_a_layer_that_was_replaced_is_named() -> None:
    """As AutoTP does it, and other libraries that swap linear layers."""
    model = lift_ds.attach(small_llama(), CONFIG)
    model.model.layers[1].mlp.up_proj = nn.Linear(32, 80, bias=False)
    with pytest.raises(
        ValueError, match=r"model\.layers\.1\.mlp\.up_proj, which LIFT manages, is no part of the Llama"
    ):
        lift_ds.LiftAdamW(model)


def test_a_layer_that_was_frozen_is_named() -> None:
    model = lift_ds.attach(small_llama(), CONFIG)
    model.model.layers[0].requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"principal values of model\.layers\.0\.self_attn\.q_proj do not require grad"
    ):
        lift_ds.LiftAdamW(model)
