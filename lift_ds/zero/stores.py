"""Where DeepSpeed's optimizers keep the principal state: one store for each way.

wrapper                          W        θ        I                     master, exp_avg, exp_avg_sq
FP16_UnfusedOptimizer (0)        whole    whole    whole                 whole, one per parameter
DeepSpeedZeroOptimizer (1, 2)    whole    whole    1/N (or replicated)   1/N of the flat group
BF16_Optimizer (1, fp32 grads)   whole    whole    1/N (or replicated)   1/N of the flat group
DeepSpeedZeroOptimizer_Stage3    1/N      1/N      1/N                   1/N
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cached_property, partial
from itertools import zip_longest
from typing import Any

import torch
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor

from lift_ds.index.encoding import CompactIndex
from lift_ds.model.layers import PrincipalLayer
from lift_ds.refresh.carry import MOMENTS, PrincipalState, Range
from lift_ds.refresh.store import DenseStore, NewIndex, differences, put_values, weights_at, write_back_batches
from lift_ds.zero.partitioned import (
    assign,
    empty_if_partitioned,
    gathered,
    gathered_to,
    padded,
    put_values_in_shard,
    shard_range,
    shard_ranges,
    weights_in_shard,
)
from lift_ds.zero.sharded_index import ShardedIndex
from lift_ds.zero.state_exchange import Held, carry_between

#: Layers that are carried over together at most: each rank holds their new indices.
_TURN = 4


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

    def _batches(self, layers: Sequence[PrincipalLayer]) -> list[list[PrincipalLayer]]:
        """Cut layers into turns in which a rank holds no more, of the states, than of one matrix alone."""
        size = min(self.ranks, _TURN)
        return [list(layers[start : start + size]) for start in range(0, len(layers), size)]

    def total(self, count: int) -> int:
        """One all-reduce."""
        everyone = torch.tensor([count], device=get_accelerator().current_device_name())
        comm.all_reduce(everyone, group=self._group)
        return int(everyone)

    def _totals(self, counts: Sequence[tuple[Tensor, int]]) -> Tensor:
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

    A refresh moves no weight: every rank has them all, and the owner broadcasts the new index (2 k bytes). The old one
    is there since backward, so each rank knows which entries of its fragment stay and which of them another rank holds
    from now on; those alone move. Write-back uses the index that backward has gathered, and moves nothing.

    Args:
        wrapper: DeepSpeed's optimizer.
        index: the sharded index; None where it is replicated.
        layers: all managed layers.
    """

    sharded = False

    def __init__(self, wrapper: Any, index: ShardedIndex | None, layers: Sequence[PrincipalLayer]) -> None:
        super().__init__(wrapper.real_dp_process_group[0])
        self._optimizer = wrapper.optimizer
        self._index = index
        self._layers = list(layers)

    def collect(self, layer: PrincipalLayer, owner: int) -> Tensor | None:
        return layer.weight.detach() if owner == self.rank else None

    def choose(self, layer: PrincipalLayer, weight: Tensor, index: Tensor) -> NewIndex:
        return NewIndex(layer.principal.index.encode(index), None)

    def hand_out(self, layer: PrincipalLayer, owner: int, selection: NewIndex | None) -> NewIndex:
        return NewIndex(self._words_from_owner(layer, owner, selection), None)

    def whole_index(self, layer: PrincipalLayer) -> AbstractContextManager[object]:
        return nullcontext() if self._index is None else self._index.whole(layer.principal.index)

    def turns(self, layers: Sequence[PrincipalLayer]) -> list[list[PrincipalLayer]]:
        """In a turn are layers whose states lie with different ranks, which then work at the same time.

        One all-gather at the first call.
        """
        of_ranks: list[list[PrincipalLayer]] = [[] for _ in range(self.ranks)]
        for layer in layers:
            first_holder = next(rank for rank, (start, stop) in enumerate(self._ranges[layer]) if start < stop)
            of_ranks[first_holder].append(layer)
        turns = ([layer for layer in turn if layer is not None] for turn in zip_longest(*of_ranks))
        return [batch for turn in turns for batch in self._batches(turn)]

    @torch.no_grad()
    def carry(self, new: Sequence[tuple[PrincipalLayer, NewIndex]]) -> int:
        with ExitStack() as stack:
            for layer, _ in new:
                stack.enter_context(self.whole_index(layer))
            replaced = self._carry_fragments(new)
        for layer, selection in new:
            # On every rank from its own W, which has been written back.
            new_index = CompactIndex(selection.words, layer.principal.index.layout)
            layer.principal_values.copy_(weights_at(layer.weight, new_index))
            if self._index is None:
                layer.principal.index.words.copy_(selection.words)
            else:
                self._index.store(layer.principal.index, selection.words)
        return replaced

    def _carry_fragments(self, new: Sequence[tuple[PrincipalLayer, NewIndex]]) -> int:
        """Carry over the fragments of master and moments that this rank holds; return how many entries are new."""
        held = [self._held(layer, selection) for layer, selection in new]
        replaced = 0
        for one, (state, count) in zip(held, carry_between(held, self._group), strict=True):
            for mine, tensor in zip(one.state(), state, strict=True):
                mine.copy_(tensor)
            replaced += count
        return replaced

    def _held(self, layer: PrincipalLayer, selection: NewIndex) -> Held:
        """Return what this rank holds of a layer; the weights have been written back."""
        index, ranges = layer.principal.index, self._ranges[layer]
        start, stop = ranges[self.rank]
        new = CompactIndex(selection.words, index.layout)
        current = layer.weight.detach().view(-1)[:0]
        if start < stop:
            current = layer.weight.detach().view(-1)[new.positions()[start:stop].long()]
        return Held(index.compact(), partial(self._own_state, layer.principal_values), new, current, ranges)

    @cached_property
    def _ranges(self) -> dict[PrincipalLayer, list[Range]]:
        """Of the k entries of each layer the range whose state each rank holds; one all-gather."""
        own = [_own_range(layer.principal_values) for layer in self._layers]
        mine = torch.tensor(own, device=get_accelerator().current_device_name()).flatten()  # [2 * layers]
        everyone = mine.new_empty(self.ranks * mine.numel())
        comm.all_gather_into_tensor(everyone, mine, group=self._group)
        of_layers = everyone.view(self.ranks, -1, 2).transpose(0, 1).tolist()  # [layers, N, 2]
        return {layer: [*map(tuple, found)] for layer, found in zip(self._layers, of_layers, strict=True)}

    def _own_state(self, values: Any) -> PrincipalState:
        """Return master and moments of the fragment that this rank holds, as they lie in DeepSpeed's flat groups."""
        held = values._hp_mapping
        if held is None:
            return PrincipalState(*(values.new_empty(0, dtype=torch.float32) for _ in PrincipalState._fields))
        # Not the moments that DeepSpeed has linked to θ: a checkpoint loaded since then has replaced them.
        (flat,) = self._optimizer.param_groups[held.param_group_index]["params"]
        address = held.get_hp_fragment_address()
        master, state = _own_fragment(values), self._optimizer.state[flat]
        if not state:  # before the first step; what is written into these is not kept
            return PrincipalState(master, *(torch.zeros_like(master) for _ in MOMENTS))
        return PrincipalState(master, *(state[key].narrow(0, address.start, address.numel) for key in MOMENTS))

    def write_back(self, layers: Sequence[PrincipalLayer]) -> None:
        for layer in layers:
            with self.whole_index(layer):
                put_values(layer.weight, layer.principal.index.compact(), layer.principal_values)

    def compare(self, layers: Sequence[PrincipalLayer], *, write_first: bool) -> Tensor:
        if self._index is not None:
            self._index.require_same_order()
        return self._totals([self._compared(layer, write_first) for layer in layers])

    def _compared(self, layer: PrincipalLayer, write_first: bool) -> tuple[Tensor, int]:
        """Count in the part of the master values that this rank holds."""
        with self.whole_index(layer):
            index = layer.principal.index.compact()
            if write_first:
                put_values(layer.weight, index, layer.principal_values)
            start, stop = _own_range(layer.principal_values)
            master = _own_fragment(layer.principal_values)
            return differences(weights_at(layer.weight, index)[start:stop], master), stop - start

    def release(self) -> None:
        if self._index is not None:
            self._index.release_all()

    def end_backward(self, layers: Iterable[PrincipalLayer]) -> None:
        pass


class PartitionedParameterStore(_RankedStore):
    """Stage 3: everything is sharded, and whole only while gathered.

    In a refresh the shards of a weight are gathered to its owner, so that each weight crosses the network about once in
    total; the owner broadcasts the new index and the weights there (2 k + 2 k bytes in bf16). The old index is
    all-gathered (2 k); of the states those entries move that another rank holds from now on. Write-back all-gathers θ
    and I of some layers at a time.

    Args:
        wrapper: DeepSpeed's optimizer.
    """

    sharded = True

    def __init__(self, wrapper: Any) -> None:
        super().__init__(wrapper.dp_process_group)
        self._offload = wrapper.parameter_offload

    def collect(self, layer: PrincipalLayer, owner: int) -> Tensor | None:
        return gathered_to(layer.weight, owner)

    def choose(self, layer: PrincipalLayer, weight: Tensor, index: Tensor) -> NewIndex:
        return NewIndex(layer.principal.index.encode(index), weight.view(-1)[index.long()])

    def hand_out(self, layer: PrincipalLayer, owner: int, selection: NewIndex | None) -> NewIndex:
        """One broadcast, of index and weights behind each other."""
        parcel = None
        if selection is not None:
            assert selection.current is not None, "the owner hands out the weights too"
            parcel = torch.cat([selection.words.view(torch.uint8), selection.current.view(torch.uint8)])
        size = 4 * layer.principal.index.word_count()  # bytes of the index
        whole = size + layer.entries() * layer.weight.element_size()
        parcel = self._from_owner(owner, parcel, whole, torch.uint8)
        # A copy of the second part, which need not begin where numbers of its size may.
        return NewIndex(parcel[:size].view(torch.int32), parcel[size:].clone().view(layer.weight.dtype))

    def whole_index(self, layer: PrincipalLayer) -> AbstractContextManager[object]:
        return gathered([layer.principal.index.words])

    def turns(self, layers: Sequence[PrincipalLayer]) -> list[list[PrincipalLayer]]:
        """The old indices of a turn are gathered in one collective."""
        return self._batches(layers)

    @torch.no_grad()
    def carry(self, new: Sequence[tuple[PrincipalLayer, NewIndex]]) -> int:
        with gathered([layer.principal.index.words for layer, _ in new]):
            old = [layer.principal.index.compact() for layer, _ in new]
        held = [_held(layer, index, selection) for (layer, selection), index in zip(new, old, strict=True)]
        replaced = 0
        for (layer, selection), (state, count) in zip(new, carry_between(held, self._group), strict=True):
            assert selection.current is not None, "the owner hands out the weights too"
            _store_state(layer.principal_values, state)
            assign(layer.principal_values, selection.current)
            assign(layer.principal.index.words, selection.words)
            replaced += count
        return replaced

    def write_back(self, layers: Sequence[PrincipalLayer]) -> None:
        for layer in _whole_in_batches(layers):
            put_values_in_shard(layer.weight, layer.principal.index.compact(), layer.principal_values.detach())

    def compare(self, layers: Sequence[PrincipalLayer], *, write_first: bool) -> Tensor:
        return self._totals([self._compared(layer, write_first) for layer in _whole_in_batches(layers)])

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

    def end_backward(self, layers: Iterable[PrincipalLayer]) -> None:
        """Without it the weights of layers stay whole whose input needs no gradient, such as the first ones."""
        self._offload.release_backward_leftovers()
        for layer in layers:
            empty_if_partitioned(layer.principal_values)  # autograd has seen θ in its logical shape


def _whole_in_batches(layers: Sequence[PrincipalLayer]) -> Iterator[PrincipalLayer]:
    """Yield layers whose θ and I are whole meanwhile; one all-gather for each batch of them."""
    for batch in write_back_batches([layer.entries() for layer in layers]):
        principal = [layer.principal for layer in layers[batch]]
        with gathered([p for one in principal for p in (one.values, one.index.words)]):
            yield from layers[batch]


def _own_range(values: Any) -> Range:
    """Return which of the k master values this rank of stage 1 or 2 holds."""
    if values._hp_mapping is None:
        return 0, 0
    address = values._hp_mapping.lp_fragment_address
    return address.start, address.start + address.numel


def _own_fragment(values: Any) -> Tensor:
    """Return the master values that this rank of stage 1 or 2 holds."""
    return values.new_empty(0) if values._hp_mapping is None else values._hp_mapping.get_hp_fragment()


def _held(layer: PrincipalLayer, old: CompactIndex, selection: NewIndex) -> Held:
    """Return what this rank of stage 3 holds of a layer."""
    assert selection.current is not None, "the owner hands out the weights too"
    values, ranges = layer.principal_values, shard_ranges(layer.principal_values)
    start, stop = shard_range(values)
    new = CompactIndex(selection.words, old.layout)
    return Held(old, partial(_own_state, values), new, selection.current[start:stop], ranges)


def _own_state(values: Any) -> PrincipalState:
    """Return a copy of the state that this rank of stage 3 holds, padding excluded."""
    start, stop = shard_range(values)
    if not _has_moments(values):
        master = _own_master(values)[: stop - start].clone()
        return PrincipalState(master, *(torch.zeros_like(master) for _ in MOMENTS))
    read = [partial(safe_get_local_optimizer_state, values, key) for key in MOMENTS]
    # Copied one after the other: where they live on a disk, they are read into the same memory.
    return PrincipalState(*(part().view(-1)[: stop - start].clone() for part in (partial(_own_master, values), *read)))


def _store_state(values: Any, state: PrincipalState) -> None:
    """Store the state that this rank of stage 3 holds from now on."""
    with padded(values) as fill:
        safe_set_local_fp32_param(values, fill(state.master))
        for key in MOMENTS if _has_moments(values) else ():
            safe_set_local_optimizer_state(values, fill(getattr(state, key)), key)


def _has_moments(values: Any) -> bool:
    """Tell whether Adam has a state yet; before the first step it has none."""
    return any(values._z3_optimizer.optimizer.state.values())


def _own_master(values: Any) -> Tensor:
    """Return the master values that this rank of stage 3 holds, padded to the shard's length."""
    return safe_get_local_fp32_param(values).view(-1)
