"""Where DeepSpeed's optimizers keep the principal state: one store for each way.

    wrapper                          θ                     master, exp_avg, exp_avg_sq        W and I
    DeepSpeedZeroOptimizer (1, 2)    whole on every rank   1/N of the flat group on a rank    whole on every rank
    BF16_Optimizer (1, fp32 grads)   whole                 1/N of the flat group              whole
    DeepSpeedZeroOptimizer_Stage3    1/N                   1/N                                1/N
    FP16_UnfusedOptimizer (0)        whole                 whole, one per parameter           whole

Sharding the index in stages 0 to 2 will happen behind the same methods.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor

from lift_ds.layers import PrincipalLayer
from lift_ds.refresh import DenseStore, Selection, put_values
from lift_ds.selection import PrincipalState
from lift_ds.zero.partitioned import assign, gathered, gathered_to, put_values_in_shard


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


class _RankedStore:
    """What the stores of several ranks have in common.

    Args:
        group: the data-parallel ranks.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self.rank = comm.get_rank(group=group)
        self.ranks = comm.get_world_size(group=group)

    def agree(self, failure: str, seconds: float) -> list[float]:
        """One all-gather of two numbers a rank; the text of a failure crosses the network only if there is one."""
        device = get_accelerator().current_device_name()
        mine = torch.tensor([float(bool(failure)), seconds], device=device)
        everyone = torch.empty(self.ranks * 2, device=device)
        comm.all_gather_into_tensor(everyone, mine, group=self._group)
        everyone = everyone.view(self.ranks, 2)
        failed = everyone[:, 0].nonzero()
        if failed.numel():
            raise ValueError(self._text_of(failure, int(failed[0])))
        return everyone[:, 1].tolist()

    def _text_of(self, failure: str, rank: int) -> str:
        text = [failure]
        torch.distributed.broadcast_object_list(text, src=self._global(rank), group=self._group)
        return text[0]

    def _global(self, rank: int) -> int:
        return comm.get_global_rank(self._group, rank) if self._group is not None else rank

    def _from_owner(self, owner: int, tensor: Tensor | None, like: PrincipalLayer, dtype: torch.dtype) -> Tensor:
        """Broadcast k numbers that the owner has."""
        if tensor is None:
            tensor = torch.empty(like.entries(), dtype=dtype, device=get_accelerator().current_device_name())
        comm.broadcast(tensor.view(torch.uint8), self._global(owner), group=self._group)
        return tensor


class PartitionedStateStore(_RankedStore):
    """Stages 1 and 2: master and moments are shards of flat groups; θ, W and I are whole on every rank.

    A refresh moves no weight: every rank has them all, and the owner broadcasts the new index (4 k bytes). Reading a
    state all-reduces k float32 values for each of its three tensors; writing and write-back are local.

    Args:
        wrapper: DeepSpeed's optimizer.
    """

    def __init__(self, wrapper: Any) -> None:
        super().__init__(wrapper.real_dp_process_group[0])
        self._wrapper = wrapper

    def collect(self, layer: PrincipalLayer, owner: int) -> Tensor | None:
        return layer.weight.detach() if owner == self.rank else None

    def hand_out(self, layer: PrincipalLayer, owner: int, selection: Selection | None) -> Selection:
        index = self._from_owner(owner, selection.index if selection else None, layer, torch.int32)
        return Selection(index, layer.weight.detach().view(-1)[index.long()])

    def whole_index(self, layer: PrincipalLayer) -> AbstractContextManager[object]:
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


class PartitionedParameterStore(_RankedStore):
    """Stage 3: everything is sharded, and whole only while gathered.

    In a refresh the shards of a weight are gathered to its owner, so that each weight crosses the network about once in
    total; the owner broadcasts the new index and the weights there (4 k + 2 k bytes in bf16). The old index is
    all-gathered; reading a state all-gathers k float32 values for each of its three tensors; a write is local;
    write-back all-gathers θ and I of one layer.

    Args:
        wrapper: DeepSpeed's optimizer.
    """

    def __init__(self, wrapper: Any) -> None:
        super().__init__(wrapper.dp_process_group)

    def collect(self, layer: PrincipalLayer, owner: int) -> Tensor | None:
        return gathered_to(layer.weight, owner)

    def hand_out(self, layer: PrincipalLayer, owner: int, selection: Selection | None) -> Selection:
        return Selection(
            self._from_owner(owner, selection.index if selection else None, layer, torch.int32),
            self._from_owner(owner, selection.current if selection else None, layer, layer.weight.dtype),
        )

    def whole_index(self, layer: PrincipalLayer) -> AbstractContextManager[object]:
        return gathered([layer.principal_index])

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
