"""How fast the devices of a job send to each other, by the backend that the job would use: NCCL, or gloo on CPUs.

Every node is measured with every other one, and every device of a node with every other one in it. In a round each
device has one partner. Between nodes all devices of a node send at once, each to the one of its number on the other
node, as in a ring of a collective: a link of a node is then shared as in training.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lift_ds.doctor import transport

#: Bytes of the first message and the most of one, on the host and on a device; each is four times the one before it.
_FIRST, _MOST_HOST, _MOST_DEVICE, _FACTOR = 256 << 10, 64 << 20, 512 << 20, 4

#: Seconds from which a message is long enough to tell the speed, and times that it is then repeated.
_LONG, _REPEATED = 0.1, 2

#: Seconds that a single exchange may take, and that a round is given in the time limit of all.
_EXCHANGE, _ROUND = 60.0, 15.0

#: A round: pairs of ranks that measure at the same time, no rank twice.
Round = list[tuple[int, int]]


def tournament(players: int) -> list[Round]:
    """Return rounds in which each of some players meets every other one once.

    Args:
        players: how many.
    """
    seats: list[int | None] = list(range(players))
    if players % 2:
        seats.append(None)
    rounds = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        pairs = zip(seats[:half], reversed(seats[half:]), strict=True)
        rounds.append([(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return rounds


def inside(nodes: Sequence[Sequence[int]]) -> list[Round]:
    """Return the rounds within nodes; all nodes measure at the same time.

    Args:
        nodes: the ranks of each.
    """
    games = [[[(ranks[a], ranks[b]) for a, b in pairs] for pairs in tournament(len(ranks))] for ranks in nodes]
    longest = max(map(len, games))
    return [[pair for rounds in games if number < len(rounds) for pair in rounds[number]] for number in range(longest)]


def across(nodes: Sequence[Sequence[int]]) -> list[Round]:
    """Return the rounds between nodes: the devices of one number, as many as every node has.

    Args:
        nodes: the ranks of each.
    """
    devices = min(map(len, nodes))
    return [
        [(nodes[a][number], nodes[b][number]) for a, b in pairs for number in range(devices)]
        for pairs in tournament(len(nodes))
    ]


def time_limit(nodes: Sequence[Sequence[int]]) -> float:
    """Return the seconds that measuring all of it may take.

    Args:
        nodes: the ranks of each.
    """
    return 2 * _EXCHANGE + _ROUND * (len(inside(nodes)) + len(across(nodes)))


def measure(store: dist.Store, rank: int, local_rank: int, nodes: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Measure with all others; all ranks call.

    Args:
        store: to meet through.
        rank: of this process.
        local_rank: on its node.
        nodes: the ranks of each.

    Returns:
        "links": "from", "to" and "rate" (bytes a second) of what this rank has sent; "transport": see `transport`.
    """
    with tempfile.TemporaryDirectory() as folder:
        on_device = torch.cuda.is_available()
        if on_device:
            torch.cuda.set_device(local_rank % torch.cuda.device_count())
            log = f"{folder}/nccl.%p"
            os.environ.update(NCCL_DEBUG="INFO", NCCL_DEBUG_SUBSYS="INIT,NET", NCCL_DEBUG_FILE=log)
        dist.init_process_group(
            "nccl" if on_device else "gloo", store=dist.PrefixStore("lift_ds/doctor/group", store), rank=rank,
            world_size=sum(map(len, nodes)), timeout=timedelta(seconds=_EXCHANGE),
        )  # fmt: skip
        device = torch.device("cuda" if on_device else "cpu")
        # Filled, so that no page of it is met for the first time while it is sent.
        buffer = torch.ones(_MOST_DEVICE if on_device else _MOST_HOST, dtype=torch.uint8, device=device)
        links = []
        for pairs in [*inside(nodes), *across(nodes)]:
            dist.all_reduce(torch.ones(1, device=device))  # all begin a round together
            for pair in pairs:
                if rank in pair:
                    links.append(_send_and_receive(buffer, rank, *pair))
        said = "".join(path.read_text(errors="replace") for path in Path(folder).iterdir())
    return {"links": links, "transport": transport.read(said) if on_device else None}


def _send_and_receive(buffer: Tensor, rank: int, low: int, high: int) -> dict[str, Any]:
    if rank == low:
        rate = _send(buffer, high)
        _receive(buffer, high)
        return {"from": low, "to": high, "rate": rate}
    _receive(buffer, low)
    return {"from": high, "to": low, "rate": _send(buffer, low)}


def _send(buffer: Tensor, to: int) -> float:
    """Send messages that grow until one takes long enough; return the bytes a second of the fastest of that size."""
    size, left, best = _FIRST, _REPEATED, 0.0
    _message(buffer, size, to)  # the first one makes the connection
    while left:
        seconds = _message(buffer, size, to)
        if seconds < _LONG and size < buffer.numel():
            size *= _FACTOR
        else:
            best = max(best, size / seconds)
            left -= 1
        _tell(size if left else 0, to, buffer.device)
    return best


def _message(buffer: Tensor, size: int, to: int) -> float:
    began = time.monotonic()
    dist.send(buffer[:size], to)
    dist.recv(answer := torch.empty(1, device=buffer.device), to)
    answer.item()  # waits for the device
    return time.monotonic() - began


def _tell(size: int, to: int, device: torch.device) -> None:
    dist.send(torch.tensor([size], device=device), to)


def _receive(buffer: Tensor, source: int) -> None:
    size, first = _FIRST, True
    word = torch.zeros(1, dtype=torch.int64, device=buffer.device)
    while size:
        dist.recv(buffer[:size], source)
        dist.send(torch.ones(1, device=buffer.device), source)
        if not first:
            dist.recv(word, source)
            size = int(word)
        first = False
