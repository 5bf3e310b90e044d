"""Frozen weights within a node, in ZeRO-3: each node has a copy, of which each of its ranks holds a part.

                  frozen_weights "all"             "node", nodes of n ranks
    W, I          1/N on each of all N ranks       1/n on each rank of a node, the same on every node
    θ, states     1/N                              1/N

DeepSpeed gathers a parameter from the ranks of its own process group, so what forward and backward fetch does not leave
the node. Checkpoints are those of "all": before one is saved or loaded each rank makes its 1/N of what its node has,
and afterwards the nodes are filled again.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import psutil
import torch
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from lift_ds.model.partition import is_partitioned
from lift_ds.runtime.ranks import from_all
from lift_ds.zero.partitioned import lives_on_nvme

#: Values of the setting `frozen_weights` that are no number of ranks.
AUTO, ALL, NODE = "auto", "all", "node"

#: Of a rank's memory, what its part of a node's copy takes at most for AUTO to mean NODE. The rest is for activations
#: and states, which nobody knows before the first step.
SHARE_OF_MEMORY = 0.5


def placement_that_fits(parameters: Iterable[Any]) -> str:
    """Return what AUTO means for the parameters of a model: NODE on several nodes that have room for it, else ALL.

    Args:
        parameters: of the model. Those on a disk stay where they are.

    Returns:
        The same on every rank, all of which call; one all-gather.
    """
    frozen = _frozen_shards(parameters)
    on_host = any(parameter.ds_tensor.device.type == "cpu" for parameter in frozen)
    memory = psutil.virtual_memory().total if on_host else get_accelerator().total_memory()
    of_ranks = from_all((socket.gethostname(), int(memory)))
    if any(lives_on_nvme(parameter) for parameter in frozen):
        return ALL
    hosts = [host for host, _ in of_ranks]
    sharing = Counter(hosts) if on_host else dict.fromkeys(hosts, 1)  # the ranks of a host have its memory together
    of_each = [size // sharing[host] for host, size in of_ranks]
    return fitting(hosts, of_each, sum(p.ds_numel * p.element_size() for p in frozen))


def fitting(hosts: Sequence[str], memory: Sequence[int], size: int) -> str:
    """Return NODE where each of several nodes has room for a copy, and as many ranks as the others; else ALL.

    Args:
        hosts: of each rank.
        memory: bytes of each rank.
        size: bytes of a copy.
    """
    ranks = Counter(hosts)
    if len(ranks) == 1 or len({*ranks.values()}) > 1:
        return ALL
    return NODE if size / ranks[hosts[0]] <= SHARE_OF_MEMORY * min(memory) else ALL


def _frozen_shards(parameters: Iterable[Any]) -> list[Any]:
    return [p for p in parameters if not p.requires_grad and is_partitioned(p)]


def ranks_of_nodes(setting: str, hosts: Sequence[str]) -> list[list[int]]:
    """Return which ranks share a copy.

    Args:
        setting: NODE, or how many ranks in a row.
        hosts: the host of each rank; for a number only how many there are counts.

    Raises:
        ValueError: nodes have different numbers of ranks, or the number does not divide them.
    """
    if setting != NODE:
        size = int(setting)
        if len(hosts) % size:
            raise ValueError(f"frozen_weights={setting!r}: {len(hosts)} ranks are no multiple of it")
        return [list(range(first, first + size)) for first in range(0, len(hosts), size)]
    nodes: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        nodes.setdefault(host, []).append(rank)
    sizes = {len(ranks) for ranks in nodes.values()}
    if len(sizes) > 1:
        counts = ", ".join(f"{host}: {len(ranks)}" for host, ranks in nodes.items())
        raise ValueError(f"frozen_weights={NODE!r} needs as many ranks on each node; there are {counts}")
    return list(nodes.values())


class NodeShards:
    """The frozen parameters of a model, and where their parts lie.

    Args:
        parameters: of the model; those that are partitioned and not trained are placed.
        setting: NODE, or how many ranks share a copy.

    Attributes:
        setting: as given.
        copies: how many there are.
        sharers: ranks of each.

    Raises:
        ValueError: as `ranks_of_nodes`, or where parameters live on a disk.
    """

    def __init__(self, parameters: Iterable[Any], setting: str) -> None:
        self._parameters = _frozen_shards(parameters)
        on_disk = next((p for p in self._parameters if lives_on_nvme(p)), None)
        if on_disk is not None:
            raise ValueError(
                f'frozen_weights={setting!r} does not go with "offload_param" on a disk; leave one of them out'
            )
        hosts = from_all(socket.gethostname()) if setting == NODE else [""] * comm.get_world_size()
        nodes = ranks_of_nodes(setting, hosts)
        self._all = self._parameters[0].ds_process_group if self._parameters else None
        # Every rank makes the groups of all nodes, in the same order.
        groups = [comm.new_group(ranks) for ranks in nodes]
        rank = comm.get_rank()
        self._own = next(group for group, ranks in zip(groups, nodes, strict=True) if rank in ranks)
        self.setting, self.copies, self.sharers = setting, len(nodes), len(nodes[0])

    def fill_nodes(self) -> None:
        """Give each node a copy; each parameter is gathered from all ranks once. All ranks call."""
        self._move(self._own)

    def share_out(self) -> None:
        """Let each rank hold 1/N again; each parameter is gathered within the node once. All ranks call."""
        self._move(self._all)

    @torch.no_grad()
    def _move(self, group: Any) -> None:
        for parameter in self._parameters:
            if parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE:
                parameter.all_gather([parameter])
            parameter.ds_process_group = group
            parameter.ds_zero_partition_rank = comm.get_rank(group=group)
            parameter.ds_zero_partition_world_size = comm.get_world_size(group=group)
            parameter.ds_tensor = None  # made anew, of the size that is right there
            parameter.partition([parameter])
