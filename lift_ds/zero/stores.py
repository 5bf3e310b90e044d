"""Where DeepSpeed's optimizers keep the principal state: one store for each way.

wrapper                          W        θ        I                     master, exp_avg, exp_avg_sq
FP16_UnfusedOptimizer (0)        whole    whole    whole                 whole, one per parameter
DeepSpeedZeroOptimizer (1, 2)    whole    whole    1/N (or replicated)   1/N of the flat group
BF16_Optimizer (1, fp32 grads)   whole    whole    1/N (or replicated)   1/N of the flat group
DeepSpeedZeroOptimizer_Stage3    1/N      1/N      1/N                   1/N
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor

from lift_ds.model.layers import PrincipalLayer
from lift_ds.refresh.carry import MOMENTS, PrincipalState
from lift_ds.refresh.store import DenseStore, NewIndex, differences, put_values, weights_at, write_back_batches
from lift_ds.zero.partitioned import (
    assign,
    gathered,
    gathered_to,
    own_part,
    put_values_in_shard,
    shard_range,
    weights_in_shard,
)
from lift_ds.zero.sharded_index import ShardedIndex


class MasterCopyStore(DenseStore):
    """Stage 0 in bf16 or fp16: a float32 master for each parameter, whole on every rank.

    Args:
        wrapper: DeepSpeed's optimizer.
    """

    values_are_master = False

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

    values_are_master = False

    def __init__(self, group: Any) -> None:
        self._group = group
        self.rank = comm.get_rank(group=group)
        self.ranks = comm.get_world_size(group=group)

    def agree(self, failure: str, numbers: Sequence[float]) -> list[list[float]]:
        """One all-gather of a few numbers a rank; the text of a failure crosses the network only if there is one."""
        device = get_accelerator().current_device_name()
        mine = torch.tensor([float(bool(failure)), *numbers], device=device)
        everyone = mine.new_empty(self.ranks * mine.numel())
        comm.all_gather_into_tensor(everyone, mine, group=self._group)
        everyone = everyone.view(self.ranks, -1)
        failed = everyone[:, 0].nonzero()
        if failed.numel():
            raise ValueError(self._text_of(failure, int(failed[0])))
        return everyone[:, 1:].tolist()

    def on_any_rank(self, flags: Sequence[bool]) -> list[bool]:
        """One all-reduce."""
        anywhere = torch.tensor(flags, dtype=torch.int32, device=get_accelerator().current_device_name())
        comm.all_reduce(anywhere, op=comm.ReduceOp.MAX, group=self._group)
        return [bool(flag) for flag in anywhere.tolist()]

    def _total(self, counts: Sequence[tuple[Tensor, int]]) -> Tensor:
        """Add up the counts of all ranks, int64 [len(counts), 2]; one all-reduce."""
        device = get_accelerator().current_device_name()
        total = torch.tensor([[int(differing), found] for differing, found in counts], device=device)
        comm.all_reduce(total, group=self._group)
        return total.cpu()

    def _text_of(self, failure: str, rank: int) -> str:
        text = [failure]
        torch.distributed.broadcast_object_list(text, src=self._global(rank), group=self._group)
        return text[0]

    def _global(self, rank: int) -> int:
        return comm.get_global_rank(self._group, rank) if self._group is not None else rank

    def _from_owner(self, owner: int, tensor: Tensor | None, size: int, dtype: torch.dtype) -> Tensor:
        """Broadcast `size` numbers that the owner has."""
        if tensor is None:
            tensor = torch.empty(size, dtype=dtype, device=get_accelerator().current_device_name())
        # As bytes: not every backend broadcasts every dtype.
        comm.broadcast(tensor.view(torch.uint8), self._global(owner), group=self._group)
        return tensor

    def _words_from_owner(self, layer: PrincipalLayer, owner: int, selection: NewIndex | None) -> Tensor:
        words = None if selection is None else selection.words
        return self._from_owner(owner, words, layer.principal.index.word_count(), torch.int32)


class PartitionedStateStore(_RankedStore):
    """Stages 1 and 2: master and moments are shards of flat groups, the index too; θ and W are whole on every rank.

    A refresh moves no weight: every rank has them all, and the owner broadcasts the new index (2 k bytes). Reading a
    state is one all-reduce of 3 k float32 values, writing is local. Write-back uses the index that
    backward has gathered, and moves nothing.

    Args:
        wrapper: DeepSpeed's optimizer.
        index: the sharded index; None where it is replicated.
    """

    sharded = False

    def __init__(self, wrapper: Any, index: ShardedIndex | None) -> None:
        super().__init__(wrapper.real_dp_process_group[0])
        self._wrapper = wrapper
        self._index = index

    def collect(self, layer: PrincipalLayer, owner: int) -> Tensor | None:
        return layer.weight.detach() if owner == self.rank else None

    def choose(self, layer: PrincipalLayer, weight: Tensor, index: Tensor) -> NewIndex:
        return NewIndex(layer.principal.index.encode(index), None)

    def hand_out(self, layer: PrincipalLayer, owner: int, selection: NewIndex | None) -> NewIndex:
        return NewIndex(self._words_from_owner(layer, owner, selection), None)

    def current(self, layer: PrincipalLayer, selection: NewIndex, index: Tensor) -> Tensor:
        return layer.weight.detach().view(-1)[index.long()]

    def whole_index(self, layer: PrincipalLayer) -> AbstractContextManager[object]:
        return nullcontext() if self._index is None else self._index.whole(layer.principal.index)

    def read_state(self, layer: PrincipalLayer) -> PrincipalState:
        # DeepSpeed links the moments to θ at the first step after its start; a checkpoint loaded later than that
        # replaces the tensors it has linked.
        self._wrapper._hp_optimizer_states_linked = False
        self._wrapper._lazy_init_hp_params_optimizer_state()
        return _read_fragments(layer.principal_values)

    @torch.no_grad()
    def replace(self, layer: PrincipalLayer, words: Tensor, state: PrincipalState) -> None:
        safe_set_full_fp32_param(layer.principal_values, state.master)
        for key in MOMENTS:
            safe_set_full_optimizer_state(layer.principal_values, getattr(state, key), key)
        layer.principal_values.copy_(state.master)
        if self._index is None:
            layer.principal.index.words.copy_(words)
        else:
            self._index.store(layer.principal.index, words)

    def write_back(self, layers: Sequence[PrincipalLayer]) -> None:
        for layer in layers:
            with self.whole_index(layer):
                put_values(layer.weight, layer.principal.index.compact(), layer.principal_values)

    def compare(self, layers: Sequence[PrincipalLayer], *, write_first: bool) -> Tensor:
        if self._index is not None:
            self._index.require_same_order()
        return self._total([self._compared(layer, write_first) for layer in layers])

    def _compared(self, layer: PrincipalLayer, write_first: bool) -> tuple[Tensor, int]:
        """Count in the part of the master values that this rank holds."""
        with self.whole_index(layer):
            index = layer.principal.index.compact()
            if write_first:
                put_values(layer.weight, index, layer.principal_values)
            own, master = _own_fragment(layer.principal_values)
            return differences(weights_at(layer.weight, index)[own], master), master.numel()

    def release(self) -> None:
        if self._index is not None:
            self._index.release_all()


class PartitionedParameterStore(_RankedStore):
    """Stage 3: everything is sharded, and whole only while gathered.

    In a refresh the shards of a weight are gathered to its owner, so that each weight crosses the network about once in
    total; the owner broadcasts the new index and the weights there (2 k + 2 k bytes in bf16). The old index is
    all-gathered; reading a state all-gathers k float32 values for each of its three tensors; a write is local;
    write-back all-gathers θ and I of some layers at a time.

    Args:
        wrapper: DeepSpeed's optimizer.
    """

    sharded = True

    def __init__(self, wrapper: Any) -> None:
        super().__init__(wrapper.dp_process_group)

    def collect(self, layer: PrincipalLayer, owner: int) -> Tensor | None:
        return gathered_to(layer.weight, owner)

    def choose(self, layer: PrincipalLayer, weight: Tensor, index: Tensor) -> NewIndex:
        return NewIndex(layer.principal.index.encode(index), weight.view(-1)[index.long()])

    def hand_out(self, layer: PrincipalLayer, owner: int, selection: NewIndex | None) -> NewIndex:
        current = None if selection is None else selection.current
        return NewIndex(
            self._words_from_owner(layer, owner, selection),
            self._from_owner(owner, current, layer.entries(), layer.weight.dtype),
        )

    def current(self, layer: PrincipalLayer, selection: NewIndex, index: Tensor) -> Tensor:
        assert selection.current is not None, "the owner hands out the weights too"
        return selection.current

    def whole_index(self, layer: PrincipalLayer) -> AbstractContextManager[object]:
        return gathered([layer.principal.index.words])

    def read_state(self, layer: PrincipalLayer) -> PrincipalState:
        return _read_full(layer)

    def replace(self, layer: PrincipalLayer, words: Tensor, state: PrincipalState) -> None:
        # DeepSpeed's setters of whole values refuse a number of entries that N does not divide.
        with own_part(layer.principal_values) as part_of:
            safe_set_local_fp32_param(layer.principal_values, part_of(state.master))
            for key in MOMENTS:
                safe_set_local_optimizer_state(layer.principal_values, part_of(getattr(state, key)), key)
        assign(layer.principal_values, state.master)
        assign(layer.principal.index.words, words)

    def write_back(self, layers: Sequence[PrincipalLayer]) -> None:
        for layer in _whole_in_batches(layers):
            put_values_in_shard(layer.weight, layer.principal.index.compact(), layer.principal_values.detach())

    def compare(self, layers: Sequence[PrincipalLayer], *, write_first: bool) -> Tensor:
        return self._total([self._compared(layer, write_first) for layer in _whole_in_batches(layers)])

    def _compared(self, layer: PrincipalLayer, write_first: bool) -> tuple[Tensor, int]:
        """Count where this rank's shard of W is not θ, and where θ is not this rank's part of the master values."""
        index, values = layer.principal.index.compact(), layer.principal_values.detach()
        if write_first:
            put_values_in_shard(layer.weight, index, values)
        start, stop = shard_range(layer.principal_values)
        master = _own_master(layer.principal_values)[: stop - start]
        unwritten = differences(values, weights_in_shard(layer.weight, index, values))
        return unwritten + differences(values[start:stop], master), stop - start

    def release(self) -> None:
        pass


def _whole_in_batches(layers: Sequence[PrincipalLayer]) -> Iterator[PrincipalLayer]:
    """Yield layers whose θ and I are whole meanwhile; one all-gather for each batch of them."""
    for batch in write_back_batches([layer.entries() for layer in layers]):
        principal = [layer.principal for layer in layers[batch]]
        with gathered([p for one in principal for p in (one.values, one.index.words)]):
            yield from layers[batch]


def _read_fragments(values: Any) -> PrincipalState:
    """Read what the ranks of stage 1 or 2 hold fragments of; one all-reduce, where DeepSpeed's getters take three.

    Args:
        values: θ [k], linked by DeepSpeed to the fragment of its flat group that this rank holds, if any.
    """
    whole = torch.zeros(3, values.numel(), dtype=torch.float32, device=values.device)
    for row, key in enumerate((None, *MOMENTS)):
        own, fragment = _own_fragment(values, key)
        whole[row, own].copy_(fragment)
    comm.all_reduce(whole, group=values._dp_group)
    return PrincipalState(*whole)


def _own_fragment(values: Any, key: str | None = None) -> tuple[slice, Tensor]:
    """Return the part of the master values, or of a moment, that this rank holds: which of the k, and the fragment."""
    held = values._hp_mapping
    if held is None:
        return slice(0, 0), values.new_empty(0)
    start = held.lp_fragment_address.start
    return slice(start, start + held.lp_fragment_address.numel), held.get_hp_fragment(key)


def _read_full(layer: PrincipalLayer) -> PrincipalState:
    # In one all-gather it would need the local values, which DeepSpeed does not fetch from a disk.
    values = layer.principal_values
    moments = [safe_get_full_optimizer_state(values, key) for key in MOMENTS]
    return PrincipalState(*(tensor.view(-1) for tensor in (safe_get_full_fp32_param(values), *moments)))


def _own_master(values: Any) -> Tensor:
    """Return the master values that this rank of stage 3 holds, padded to the shard's length."""
    return safe_get_local_fp32_param(values).view(-1)
