"""Parameters that ZeRO-3 has partitioned: a flat shard per rank, whole only while gathered.

DeepSpeed adds attributes to such parameters (`ds_tensor` the shard, `ds_numel` the logical size, ...), hence `Any`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from typing import Any

import deepspeed
import torch
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from lift_ds.index.access import access_to
from lift_ds.index.encoding import CompactIndex
from lift_ds.model.partition import is_partitioned
from lift_ds.refresh.carry import Range, within


def gathered(parameters: Sequence[Tensor]) -> AbstractContextManager[object]:
    """Make parameters whole on every rank, for reading; one all-gather, none where nothing is partitioned.

    Args:
        parameters: any parameters. On leaving, the partitioned ones hold only their shards again.
    """
    return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=None)


class ZeroPartition:
    """The `Partition` of parameters that ZeRO-3 has partitioned; see `lift_ds.model.partition`."""

    def shape(self, parameter: Any) -> torch.Size:
        return torch.Size(parameter.ds_shape)

    def gathered(self, parameters: Sequence[Any]) -> AbstractContextManager[object]:
        """One all-gather."""
        return gathered(parameters)

    def collected(self, parameter: Any, owner: int, span: Range) -> Tensor | None:
        """What other ranks hold of it is sent to the owner."""
        return gathered_to(parameter, owner, span)

    def partition_like(self, parameter: Any, others: Sequence[Tensor]) -> None:
        """One broadcast each; afterwards each rank holds 1/N of each."""
        parameter.convert_to_zero_parameters(param_list=list(others))


PARTITION = ZeroPartition()


def empty_if_partitioned(parameter: Any) -> None:
    """Leave a partitioned parameter empty, as DeepSpeed expects it, after it was given its logical shape."""
    if parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE:
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)


@torch.no_grad()
def gathered_to(parameter: Any, owner: int, span: Range) -> Tensor | None:
    """Make a partitioned parameter, or a part of it, whole on one rank; each entry crosses the network once at most.

    Args:
        parameter: a partitioned parameter; stays as it is.
        owner: rank within the parameter's group.
        span: flat positions [start, stop).

    Returns:
        A copy of that part on the owner, 1-D; None on the other ranks. All of them call. A whole parameter takes one
        gather. For a part, those that hold something of it send that to the owner, and the others nothing.
    """
    group = parameter.ds_process_group
    rank, ranges = comm.get_rank(group=group), shard_ranges(parameter)
    pieces = within(ranges, *span)
    if rank != owner and pieces[rank] == (0, 0):
        return None
    with shard_in_memory(parameter, write=False) as held:
        shard = held.detach().to(get_accelerator().current_device_name())
        if lives_on_nvme(parameter) and shard.data_ptr() == held.data_ptr():
            shard = shard.clone()  # its buffer is used again
    if len(ranges) == 1:
        return shard[slice(*span)].clone()
    if span == (0, parameter.ds_numel):
        return _all_of(shard, parameter, owner)
    own = slice(
        max(span[0], ranges[rank][0]) - ranges[rank][0], max(0, min(span[1], ranges[rank][1]) - ranges[rank][0])
    )
    return _sent_to(owner, shard[own], pieces, group)


def _all_of(shard: Tensor, parameter: Any, owner: int) -> Tensor | None:
    """Gather all shards of a parameter; one gather."""
    group = parameter.ds_process_group
    ranks, is_owner = comm.get_world_size(group=group), comm.get_rank(group=group) == owner
    whole = torch.empty(ranks, shard.numel(), dtype=shard.dtype, device=shard.device) if is_owner else None
    # As bytes: not every backend gathers every dtype.
    parts = [part.view(torch.uint8) for part in whole] if whole is not None else None
    comm.gather(shard.view(torch.uint8), parts, dst=comm.get_global_rank(group, owner), group=group)
    return None if whole is None else whole.view(-1)[: parameter.ds_numel]


def _sent_to(owner: int, own: Tensor, pieces: Sequence[Range], group: Any) -> Tensor | None:
    """Send what each rank holds of something to its owner.

    Args:
        owner: rank within the group.
        own: what this rank holds, perhaps nothing.
        pieces: for each rank what it holds of it, counted from its beginning.
        group: of the ranks.
    """
    # In one batch, which NCCL runs on the group's own communicator. As bytes: not every backend sends every dtype.
    rank = comm.get_rank(group=group)
    if rank != owner:
        _exchange([comm.P2POp(comm.isend, own.view(torch.uint8), comm.get_global_rank(group, owner), group)])
        return None
    whole = own.new_empty(max(last for _, last in pieces))
    _exchange(
        [
            comm.P2POp(comm.irecv, whole[slice(*piece)].view(torch.uint8), comm.get_global_rank(group, other), group)
            for other, piece in enumerate(pieces)
            if other != rank and piece[0] < piece[1]
        ]
    )
    whole[slice(*pieces[rank])] = own
    return whole


def _exchange(operations: list[Any]) -> None:
    for handle in comm.batch_isend_irecv(operations) if operations else ():
        handle.wait()


def lives_on_nvme(parameter: Any) -> bool:
    """Tell whether the shard of a partitioned parameter is kept on a disk."""
    return parameter.ds_tensor.final_location == OffloadDeviceEnum.nvme


@contextmanager
def shard_in_memory(parameter: Any, *, write: bool) -> Iterator[Any]:
    """This rank's shard of a partitioned parameter, in memory within the context also where it lives on NVMe.

    Args:
        parameter: a partitioned parameter.
        write: whether the shard is changed within the context, and NVMe is to have it.
    """
    held = parameter.ds_tensor
    on_nvme = lives_on_nvme(parameter)
    swapped_in = False
    if on_nvme and held.status is PartitionedParamStatus.INFLIGHT:
        parameter.nvme_swapper.synchronize_reads()
    elif on_nvme and held.status is PartitionedParamStatus.NOT_AVAILABLE:
        parameter.nvme_swapper.swap_in([parameter], async_op=False)
        swapped_in = True
    yield held
    if on_nvme and write:
        parameter.nvme_swapper.swap_out_and_release([parameter])
    elif swapped_in:
        parameter.nvme_swapper.remove_partition_and_release_buffers([parameter])


def shard_range(parameter: Any) -> Range:
    """Return the flat positions [start, stop) of a partitioned parameter that this rank holds, padding excluded."""
    return shard_ranges(parameter)[torch.distributed.get_rank(group=parameter.ds_process_group)]


def shard_ranges(parameter: Any) -> list[Range]:
    """Return for each rank the flat positions of a partitioned parameter that it holds, padding excluded."""
    ranks = torch.distributed.get_world_size(group=parameter.ds_process_group)
    bounds = [min(rank * parameter.ds_tensor.ds_numel, parameter.ds_numel) for rank in range(ranks + 1)]
    return list(pairwise(bounds))


@contextmanager
def padded(parameter: Any) -> Iterator[Callable[[Tensor], Tensor]]:
    """Give a function that fills this rank's part of a value up to the length of a shard.

    Within the context the shard is in memory, as DeepSpeed's setters of local values ask for.

    Args:
        parameter: a partitioned parameter.
    """

    def fill(part: Tensor) -> Tensor:
        return nn.functional.pad(part, (0, parameter.ds_tensor.ds_numel - part.numel()))

    with shard_in_memory(parameter, write=False):
        yield fill


@contextmanager
def _written(parameter: Any) -> Iterator[list[tuple[Tensor, int]]]:
    """What this rank holds of a partitioned parameter, to be written into: flat parts, and where each begins.

    With `zero_hpz_partition_size` those are two: the shard, and a part of a second copy, from which DeepSpeed fetches a
    frozen parameter as long as it is there.
    """
    start, stop = shard_range(parameter)
    with shard_in_memory(parameter, write=True) as shard:
        parts = [(shard[: stop - start], start)]
        second = parameter.ds_secondary_tensor
        if second is not None:
            start = torch.distributed.get_rank(group=parameter.ds_zero_param_process_group) * second.numel()
            parts.append((second[: max(0, parameter.ds_numel - start)], start))
        yield parts


def forget_second_copy(parameter: Any) -> None:
    """Let DeepSpeed fetch a partitioned parameter from the shards of all ranks next time, and make the copy anew.

    Args:
        parameter: one whose shards have changed, or have been loaded; without a second copy nothing happens.
    """
    parameter.ds_secondary_tensor = None


@torch.no_grad()
def assign(parameter: Any, value: Tensor) -> None:
    """Set a parameter from a whole value every rank has: all of it, or this rank's shard; no collective runs.

    Args:
        parameter: any parameter.
        value: the whole value, any shape of as many elements.
    """
    if not is_partitioned(parameter):
        parameter.copy_(value.view_as(parameter))
        return
    with _written(parameter) as parts:
        for part, start in parts:
            part.copy_(value.reshape(-1)[start : start + part.numel()])
    if parameter.ds_status is ZeroParamStatus.AVAILABLE:  # small ones stay whole between steps
        parameter.copy_(value.view_as(parameter))


@torch.no_grad()
def put_values_in_shard(weight: Any, index: CompactIndex, values: Tensor) -> None:
    """W.flat[I] = θ in this rank's shard of W (and in W where it is whole at the moment); no collective runs.

    Args:
        weight: partitioned [m, n].
        index: whole.
        values: whole [k].
    """
    with _written(weight) as parts:
        for part, start in parts:
            access_to(index.to(part.device)).put(part, start, values.to(part.device))
    if weight.ds_status is ZeroParamStatus.AVAILABLE:
        access_to(index).put(weight.view(-1), 0, values)


@torch.no_grad()
def weights_in_shard(weight: Any, index: CompactIndex, elsewhere: Tensor) -> Tensor:
    """Return W.flat[I] [k] where I points into this rank's shard of W, and other values elsewhere; no collective runs.

    Args:
        weight: partitioned [m, n].
        index: whole.
        elsewhere: whole [k], for the entries in other ranks' shards.
    """
    start, stop = shard_range(weight)
    with shard_in_memory(weight, write=False) as shard:
        found = elsewhere.to(shard.device, copy=True)
        access_to(index.to(shard.device)).gather(shard[: stop - start], start, found)
    return found.to(elsewhere.device)
