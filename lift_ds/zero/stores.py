"""Where DeepSpeed's optimizers keep the principal state: one store for each way.

    wrapper                          θ                     master, exp_avg, exp_avg_sq        W and I
    DeepSpeedZeroOptimizer (1, 2)    whole on every rank   1/N of the flat group on a rank    whole on every rank
    BF16_Optimizer (1, fp32 grads)   whole                 1/N of the flat group              whole
    DeepSpeedZeroOptimizer_Stage3    1/N                   1/N                                1/N
    FP16_UnfusedOptimizer (0)        whole                 whole, one per parameter           whole

Sharding the index and the refresh over the ranks will happen behind the same four methods.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor

from lift_ds.layers import PrincipalLayer
from lift_ds.refresh import DenseStore, put_values
from lift_ds.selection import PrincipalState
from lift_ds.zero.partitioned import assign, gathered, put_values_in_shard


class MasterCopyStore(DenseStore):
    """Stage 0 in bf16 or fp16: a float32 master for each parameter, whole on every rank.

    Args:
        wrapper: DeepSpeed's optimizer.
    """

    def __init__(self, wrapper: FP16_UnfusedOptimizer) -> None:
        super().__init__(wrapper.optimizer)
        self._masters = {
            id(low): master
            for low_group, master_group in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
            for low, master in zip(low_group, master_group, strict=True)
        }

    def master(self, layer: PrincipalLayer) -> Tensor:
        return self._masters[id(layer.principal_values)]


class PartitionedStateStore:
    """Stages 1 and 2: master and moments are shards of flat groups; θ, W and I are whole on every rank.

    Reading a state all-reduces k float32 values for each of its three tensors; writing and write-back are local.

    Args:
        wrapper: DeepSpeed's optimizer.
    """

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper

    def whole(self, layer: PrincipalLayer) -> AbstractContextManager[object]:
        return nullcontext()

    def read_state(self, layer: PrincipalLayer) -> PrincipalState:
        # DeepSpeed links the moments to θ at the first step after its start; a checkpoint loaded later than that
        # replaces the tensors it has linked.
        self._wrapper._hp_optimizer_states_linked = False
        self._wrapper._lazy_init_hp_params_optimizer_state()
        return _read_full(layer)

    @torch.no_grad()
    def replace(self, layer: PrincipalLayer, index: Tensor, state: PrincipalState) -> None:
        _write_full(layer, state)
        layer.principal_values.copy_(state.master)
        layer.principal_index.copy_(index)

    def write_back(self, layer: PrincipalLayer) -> None:
        put_values(layer.weight, layer.principal_index, layer.principal_values)


class PartitionedParameterStore:
    """Stage 3: everything is sharded, and whole only while gathered.

    `whole` all-gathers W and I; reading a state all-gathers k float32 values for each of its three tensors; a write is
    local; write-back all-gathers θ and I of one layer.
    """

    def whole(self, layer: PrincipalLayer) -> AbstractContextManager[object]:
        return gathered([layer.weight, layer.principal_index])

    def read_state(self, layer: PrincipalLayer) -> PrincipalState:
        return _read_full(layer)

    def replace(self, layer: PrincipalLayer, index: Tensor, state: PrincipalState) -> None:
        _write_full(layer, state)
        assign(layer.principal_values, state.master)
        assign(layer.principal_index, index)

    def write_back(self, layer: PrincipalLayer) -> None:
        with gathered([layer.principal_values, layer.principal_index]):
            put_values_in_shard(layer.weight, layer.principal_index.detach(), layer.principal_values.detach())


def _read_full(layer: PrincipalLayer) -> PrincipalState:
    values = layer.principal_values
    moments = [safe_get_full_optimizer_state(values, key) for key in ("exp_avg", "exp_avg_sq")]
    return PrincipalState(*(tensor.view(-1) for tensor in (safe_get_full_fp32_param(values), *moments)))


def _write_full(layer: PrincipalLayer, state: PrincipalState) -> None:
    values = layer.principal_values
    safe_set_full_fp32_param(values, state.master)
    safe_set_full_optimizer_state(values, state.exp_avg, "exp_avg")
    safe_set_full_optimizer_state(values, state.exp_avg_sq, "exp_avg_sq")
