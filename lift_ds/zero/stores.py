"""Where DeepSpeed's optimizers keep the principal state: one store for each way.

wrapper                          W        θ        I                     master, exp_avg, exp_avg_sq
FP16_UnfusedOptimizer (0)        whole    whole    whole                 whole, one per parameter
DeepSpeedZeroOptimizer (1, 2)    whole    whole    1/N (or replicated)   1/N of the flat group
BF16_Optimizer (1, fp32 grads)   whole    whole    1/N (or replicated)   1/N of the flat group
DeepSpeedZeroOptimizer_Stage3    1/N      1/N      1/N                   1/N
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property, partial
from itertools import zip_longest
from typing import Any, TypeVar

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

from lift_ds.index.encoding import CompactIndex, stacked
from lift_ds.model.weights import PrincipalWeight
from lift_ds.refresh.carry import MOMENTS, PrincipalState, Range, within
from lift_ds.refresh.store import (
    DenseStore,
    NewIndex,
    WholeWeights,
    differences,
    matrix_of,
    put_values,
    weights_at,
    write_back_batches,
)
from lift_ds.zero.partitioned import (
    assign,
    empty_if_partitioned,
    forget_second_copy,
    gathered,
    gathered_to,
    padded,
    put_values_in_shard,
    shard_in_memory,
    shard_range,
    shard_ranges,
    weights_in_shard,
)
from lift_ds.zero.sharded_index import ShardedIndex
from lift_ds.zero.state_exchange import Held, carry_between

#: Weights that are carried over together at most: each rank holds their new indices.
_TURN = 4

Thing = TypeVar("Thing")


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

    def master(self, weight: PrincipalWeight) -> Tensor:
        return self._masters[id(weight.principal_values)]


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

    def _batches(self, things: Sequence[Thing]) -> list[list[Thing]]:
        """Cut weights, or matrices, into turns in which a rank holds no more, of the states, than of one alone."""
        size = min(self.ranks, _TURN)
        return [list(things[start : start + size]) for start in range(0, len(things), size)]

    def _carry_all(self, held: Sequence[tuple[Held, PrincipalState]]) -> int:
        """Carry the states of some matrices over, a few at a time; return how many of this rank's entries are new.

        Args:
            held: of each matrix what this rank holds, and where its new state is to go.
        """
        replaced = 0
        for batch in self._batches(held):
            states = carry_between([one for one, _ in batch], self._group)
            for (_, target), (state, count) in zip(batch, states, strict=True):
                for tensor, value in zip(target, state, strict=True):
                    tensor.copy_(value)
                replaced += count
        return replaced

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

    def _words_from_owner(self, weight: PrincipalWeight, owner: int, selection: NewIndex | None) -> Tensor:
        words = None if selection is None else selection.words
        return self._from_owner(owner, words, weight.layout.of_one.word_count(), torch.int32)


class PartitionedStateStore(WholeWeights, _RankedStore):
    """Stages 1 and 2: master and moments are shards of flat groups, the index too; θ and W are whole on every rank.

    A refresh moves no weight: every rank has them all, and the owner broadcasts the new index (2 k bytes). The old one
    is there since backward, so each rank knows which entries of its fragment stay and which of them another rank holds
    from now on; those alone move. Write-back uses the index that backward has gathered, and moves nothing.

    Args:
        wrapper: DeepSpeed's optimizer.
        index: the sharded index; None where it is replicated.
        weights: all managed ones.
    """

    sharded = False

    def __init__(self, wrapper: Any, index: ShardedIndex | None, weights: Sequence[PrincipalWeight]) -> None:
        super().__init__(wrapper.real_dp_process_group[0])
        self._optimizer = wrapper.optimizer
        self._index = index
        self._weights = list(weights)

    def collect(self, weight: PrincipalWeight, number: int, owner: int) -> Tensor | None:
        return matrix_of(weight, number) if owner == self.rank else None

    def choose(self, weight: PrincipalWeight, matrix: Tensor, index: Tensor) -> NewIndex:
        return NewIndex(weight.principal.index.encode(index), None)

    def hand_out(self, weight: PrincipalWeight, owner: int, selection: NewIndex | None) -> NewIndex:
        return NewIndex(self._words_from_owner(weight, owner, selection), None)

    def whole_index(self, weight: PrincipalWeight) -> AbstractContextManager[object]:
        return nullcontext() if self._index is None else self._index.whole(weight.principal.index)

    def turns(self, weights: Sequence[PrincipalWeight]) -> list[list[PrincipalWeight]]:
        """In a turn are weights whose states lie with different ranks, which then work at the same time.

        One all-gather at the first call.
        """
        of_ranks: list[list[PrincipalWeight]] = [[] for _ in range(self.ranks)]
        for weight in weights:
            first_holder = next(rank for rank, (start, stop) in enumerate(self._ranges[weight]) if start < stop)
            of_ranks[first_holder].append(weight)
        turns = ([weight for weight in turn if weight is not None] for turn in zip_longest(*of_ranks))
        return [batch for turn in turns for batch in self._batches(turn)]

    @torch.no_grad()
    def carry(self, new: Sequence[tuple[PrincipalWeight, Sequence[NewIndex]]]) -> int:
        with ExitStack() as stack:
            for weight, _ in new:
                stack.enter_context(self.whole_index(weight))
            replaced = self._carry_all([one for weight, selections in new for one in self._held(weight, selections)])
        for weight, selections in new:
            # On every rank from its own W, which has been written back.
            words = stacked([selection.words for selection in selections], weight.layout)
            weight.principal_values.copy_(weights_at(weight.weight, CompactIndex(words, weight.layout)))
            if self._index is None:
                weight.principal.index.words.copy_(words)
            else:
                self._index.store(weight.principal.index, words)
        return replaced

    def _held(self, weight: PrincipalWeight, selections: Sequence[NewIndex]) -> Iterator[tuple[Held, PrincipalState]]:
        """Yield what this rank holds of each matrix of a weight; the weights have been written back."""
        whole, old = self._own_state(weight.principal_values), weight.principal.index.compact()
        for number, (selection, state, ranges) in enumerate(
            zip(selections, *_of_matrices(whole, self._ranges[weight], self.rank, weight), strict=True)
        ):
            new = CompactIndex(selection.words, old.layout.of_one)
            current = weight.weight.detach().view(-1)[:0]
            start, stop = ranges[self.rank]
            if start < stop:
                current = matrix_of(weight, number).view(-1)[new.positions()[start:stop].long()]
            yield Held(old.of_matrix(number), state, new, current, ranges), state

    @cached_property
    def _ranges(self) -> dict[PrincipalWeight, list[Range]]:
        """Of the k entries of each weight the range whose state each rank holds; one all-gather."""
        own = [_own_range(weight.principal_values) for weight in self._weights]
        mine = torch.tensor(own, device=get_accelerator().current_device_name()).flatten()  # [2 * weights]
        everyone = mine.new_empty(self.ranks * mine.numel())
        comm.all_gather_into_tensor(everyone, mine, group=self._group)
        of_weights = everyone.view(self.ranks, -1, 2).transpose(0, 1).tolist()  # [weights, N, 2]
        return {weight: [*map(tuple, found)] for weight, found in zip(self._weights, of_weights, strict=True)}

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

    def write_back(self, weights: Sequence[PrincipalWeight]) -> None:
        for weight in weights:
            with self.whole_index(weight):
                put_values(weight.weight, weight.principal.index.compact(), weight.principal_values)

    def compare(self, weights: Sequence[PrincipalWeight], *, write_first: bool) -> Tensor:
        if self._index is not None:
            self._index.require_same_order()
        return self._totals([self._compared(weight, write_first) for weight in weights])

    def _compared(self, weight: PrincipalWeight, write_first: bool) -> tuple[Tensor, int]:
        """Count in the part of the master values that this rank holds."""
        with self.whole_index(weight):
            index = weight.principal.index.compact()
            if write_first:
                put_values(weight.weight, index, weight.principal_values)
            start, stop = _own_range(weight.principal_values)
            master = _own_fragment(weight.principal_values)
            return differences(weights_at(weight.weight, index)[start:stop], master), stop - start

    def release(self) -> None:
        if self._index is not None:
            self._index.release_all()

    def end_backward(self, weights: Iterable[PrincipalWeight]) -> None:
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

    def collect(self, weight: PrincipalWeight, number: int, owner: int) -> Tensor | None:
        """From the ranks that share the owner's copy of the weight."""
        sharers = _sharers(weight)
        if self._global(owner) not in sharers:
            return None
        size, place = weight.shape().numel(), sharers.index(self._global(owner))
        found = gathered_to(weight.weight, place, (number * size, (number + 1) * size))
        return None if found is None else found.view(weight.shape())

    def choose(self, weight: PrincipalWeight, matrix: Tensor, index: Tensor) -> NewIndex:
        return NewIndex(weight.principal.index.encode(index), matrix.view(-1)[index.long()])

    def hand_out(self, weight: PrincipalWeight, owner: int, selection: NewIndex | None) -> NewIndex:
        """One broadcast, of index and weights behind each other."""
        parcel = None
        if selection is not None:
            assert selection.current is not None, "the owner hands out the weights too"
            parcel = torch.cat([selection.words.view(torch.uint8), selection.current.view(torch.uint8)])
        one, dtype = weight.layout.of_one, weight.weight.dtype
        size = 4 * one.word_count()  # bytes of the index
        parcel = self._from_owner(owner, parcel, size + one.entries * dtype.itemsize, torch.uint8)
        # A copy of the second part, which need not begin where numbers of its size may.
        return NewIndex(parcel[:size].view(torch.int32), parcel[size:].clone().view(dtype))

    def whole_index(self, weight: PrincipalWeight) -> AbstractContextManager[object]:
        return gathered([weight.principal.index.words])

    def turns(self, weights: Sequence[PrincipalWeight]) -> list[list[PrincipalWeight]]:
        """The old indices of a turn are gathered in one collective."""
        return self._batches(weights)

    @torch.no_grad()
    def carry(self, new: Sequence[tuple[PrincipalWeight, Sequence[NewIndex]]]) -> int:
        with gathered([weight.principal.index.words for weight, _ in new]):
            old = [weight.principal.index.compact() for weight, _ in new]
        states = [_own_state(weight.principal_values) for weight, _ in new]
        replaced = self._carry_all(
            [
                one
                for (weight, selections), index, state in zip(new, old, states, strict=True)
                for one in _held(weight, index, selections, state, self.rank)
            ]
        )
        for (weight, selections), state in zip(new, states, strict=True):
            _store_state(weight.principal_values, state)
            assign(weight.principal_values, torch.cat([_current(selection) for selection in selections]))
            words = stacked([selection.words for selection in selections], weight.layout)
            assign(weight.principal.index.words, words)
        return replaced

    def write_back(self, weights: Sequence[PrincipalWeight]) -> None:
        for weight in _whole_in_batches(weights):
            put_values_in_shard(weight.weight, weight.principal.index.compact(), weight.principal_values.detach())

    def compare(self, weights: Sequence[PrincipalWeight], *, write_first: bool) -> Tensor:
        return self._totals([self._compared(weight, write_first) for weight in _whole_in_batches(weights)])

    def _compared(self, weight: PrincipalWeight, write_first: bool) -> tuple[Tensor, int]:
        """Count where this rank's shard of W is not θ, and where θ is not this rank's part of the master values."""
        index, values = weight.principal.index.compact(), weight.principal_values.detach()
        if write_first:
            put_values_in_shard(weight.weight, index, values)
        start, stop = shard_range(weight.principal_values)
        master = _own_master(weight.principal_values)[: stop - start]
        unwritten = differences(values, weights_in_shard(weight.weight, index, values))
        return unwritten + differences(values[start:stop], master), stop - start

    @contextmanager
    def held(self, parameter: Any, *, write: bool) -> Iterator[tuple[Tensor, int]]:
        start, stop = shard_range(parameter)
        with shard_in_memory(parameter, write=write) as shard:
            yield shard.data[: stop - start], start
        if write:
            forget_second_copy(parameter)

    def drop_gathered(self) -> None:
        """As DeepSpeed does before each step; also small parameters, which stay whole between steps, and those that are
        being fetched ahead.
        """
        self._offload.partition_all_parameters()

    def trained(self, weight: PrincipalWeight) -> tuple[Tensor, Tensor]:
        """One all-gather, of index and principal values."""
        principal = weight.principal
        with gathered([principal.values, principal.index.words]):
            return principal.index.positions().clone(), principal.values.detach().to(weight.weight.dtype, copy=True)

    def of_all_parts(self, weight: PrincipalWeight, piece: Tensor) -> Tensor:
        """Two all-gathers: how many each rank has, and of pieces as long as the longest."""
        group = weight.weight.ds_process_group
        ranks = comm.get_world_size(group=group)
        piece = piece.to(get_accelerator().current_device_name())
        mine = torch.tensor([piece.numel()], device=piece.device)
        counts = mine.new_empty(ranks)
        comm.all_gather_into_tensor(counts, mine, group=group)
        longest = int(counts.max())
        padded_piece = torch.cat([piece, piece.new_empty(longest - piece.numel())])
        everyone = piece.new_empty(ranks * longest)
        # As bytes: not every backend gathers every dtype.
        comm.all_gather_into_tensor(everyone.view(torch.uint8), padded_piece.view(torch.uint8), group=group)
        rows = zip(everyone.view(ranks, longest), counts.tolist(), strict=True)
        return torch.cat([row[:count] for row, count in rows])

    def has_first_copy(self, weight: PrincipalWeight) -> bool:
        return self._global(0) in _sharers(weight)

    def release(self) -> None:
        pass

    def end_backward(self, weights: Iterable[PrincipalWeight]) -> None:
        """Without it the weights of layers stay whole whose input needs no gradient, such as the first ones."""
        self._offload.release_backward_leftovers()
        for weight in weights:
            empty_if_partitioned(weight.principal_values)  # autograd has seen θ in its logical shape


def _sharers(weight: PrincipalWeight) -> list[int]:
    """Return the ranks that share the copy of a partitioned weight of which this rank has a part."""
    return torch.distributed.get_process_group_ranks(weight.weight.ds_process_group)


def _of_matrices(
    state: PrincipalState, ranges: Sequence[Range], rank: int, weight: PrincipalWeight
) -> tuple[list[PrincipalState], list[list[Range]]]:
    """Cut what a rank holds of a weight into what it holds of each of its matrices; views, and the ranges there."""
    k, (first, last) = weight.layout.of_one.entries, ranges[rank]
    states, of_matrices = [], []
    for number in range(weight.matrices):
        start, stop = number * k, (number + 1) * k
        of_matrices.append(within(ranges, start, stop))
        own = slice(max(start, first) - first, max(min(stop, last) - first, max(start, first) - first))
        states.append(PrincipalState(*(tensor[own] for tensor in state)))
    return states, of_matrices


def _whole_in_batches(weights: Sequence[PrincipalWeight]) -> Iterator[PrincipalWeight]:
    """Yield weights whose θ and I are whole meanwhile; one all-gather for each batch of them."""
    for batch in write_back_batches([weight.entries() for weight in weights]):
        principal = [weight.principal for weight in weights[batch]]
        with gathered([p for one in principal for p in (one.values, one.index.words)]):
            yield from weights[batch]


def _own_range(values: Any) -> Range:
    """Return which of the k master values this rank of stage 1 or 2 holds."""
    if values._hp_mapping is None:
        return 0, 0
    address = values._hp_mapping.lp_fragment_address
    return address.start, address.start + address.numel


def _own_fragment(values: Any) -> Tensor:
    """Return the master values that this rank of stage 1 or 2 holds."""
    return values.new_empty(0) if values._hp_mapping is None else values._hp_mapping.get_hp_fragment()


def _held(
    weight: PrincipalWeight, old: CompactIndex, selections: Sequence[NewIndex], whole: PrincipalState, rank: int
) -> Iterator[tuple[Held, PrincipalState]]:
    """Yield what this rank of stage 3 holds of each matrix of a weight, and where its new state is to go."""
    of_matrices = _of_matrices(whole, shard_ranges(weight.principal_values), rank, weight)
    for number, (selection, state, ranges) in enumerate(zip(selections, *of_matrices, strict=True)):
        new = CompactIndex(selection.words, old.layout.of_one)
        current = _current(selection)[slice(*ranges[rank])]
        yield Held(old.of_matrix(number), state, new, current, ranges), state


def _current(selection: NewIndex) -> Tensor:
    assert selection.current is not None, "the owner hands out the weights too"
    return selection.current


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
