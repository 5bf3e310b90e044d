"""Small exchanges between all ranks of a run, their agreement on what went wrong, and who has which part.

One process is a run of one rank.

Objects travel pickled, so this is for a few kilobytes at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lift_ds.runtime.logs import matrix_progress

Value = TypeVar("Value")

_alone: ContextVar[bool] = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Let this process act as a run of one rank within the context."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def rank_and_count() -> tuple[int, int]:
    """Return the number of this rank and how many there are."""
    if dist.is_available() and dist.is_initialized() and not _alone.get():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def from_all(value: Value) -> list[Value]:
    """Return what every rank gives, in the order of the ranks; one all-gather, which also waits for all of them."""
    _, count = rank_and_count()
    if count == 1:
        return [value]
    values: list[Any] = [None] * count
    dist.all_gather_object(values, value)
    return values


def together(action: Callable[[], Value]) -> list[Value]:
    """Run a local action on every rank; if it fails on one, all of them stop with its message.

    Args:
        action: runs no collective; may raise ValueError or OSError.

    Returns:
        What it gave on each rank, in the order of the ranks; one all-gather.

    Raises:
        ValueError: on every rank, with the message of the lowest rank that failed.
    """
    try:
        mine: tuple[str | None, Any] = (None, action())
    except (ValueError, OSError) as error:
        mine = (str(error) or type(error).__name__, None)
    everyone = from_all(mine)
    for failure, _ in everyone:
        if failure is not None:
            raise ValueError(failure)
    return [value for _, value in everyone]


def broadcast(tensor: Tensor, source: int) -> None:
    """Give every rank what one has, in place; one broadcast.

    Args:
        tensor: contiguous, where `exchange_device` says, of the same size and dtype on all ranks.
        source: the rank whose it is.
    """
    # As bytes: not every backend broadcasts every dtype.
    dist.broadcast(tensor.view(torch.uint8), source)


def exchange_device() -> torch.device:
    """Return where tensors are to be that this process sends to others, by the backend of the process group."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None or any(name in dist.get_backend() for name in ("gloo", "mpi")):
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def by_main(action: Callable[[], Value]) -> Value:
    """Run an action on rank 0 alone and return its result on every rank.

    Raises:
        ValueError: on every rank, when it raises ValueError or OSError there.
    """
    rank, _ = rank_and_count()
    return together(lambda: action() if rank == 0 else None)[0]  # type: ignore[return-value]


def shard_size(elements: int, ranks: int) -> int:
    """Return how many elements a rank holds of what is cut into equal shards, the last of them padded."""
    return -(-elements // ranks)


def deal_out(costs: Sequence[int], ranks: int, most: int | None = None) -> list[list[int]]:
    """Assign jobs to ranks, longest first, each to the rank with the least to do so far.

    The result depends on the arguments alone, so every rank finds the same.

    Args:
        costs: of the jobs.
        ranks: how many.
        most: how many jobs a rank may have, ranks * most >= len(costs); None for any number.

    Returns:
        For each rank the numbers of its jobs, longest first. Without `most` no rank has more than its share plus one
        job.
    """
    loads = [0] * ranks
    jobs: list[list[int]] = [[] for _ in range(ranks)]
    for job in sorted(range(len(costs)), key=lambda job: (-costs[job], job)):
        open_ranks = (rank for rank in range(ranks) if most is None or len(jobs[rank]) < most)
        rank = min(open_ranks, key=lambda rank: (loads[rank], rank))
        loads[rank] += costs[job]
        jobs[rank].append(job)
    return jobs


def in_rounds(
    jobs: Sequence[Sequence[str]],
    collect: Callable[[str, int], Value | None],
    work: Callable[[str, Value], None],
    about: str,
) -> str:
    """Let every rank do its jobs, one in each round; all ranks call, with the same jobs.

    Args:
        jobs: for each rank the names of its jobs.
        collect: gives a rank what it needs for a job (name, rank), and the others None; all ranks call it alike.
        work: does a job of this rank (name, what was collected); may raise ValueError.
        about: what a progress bar says, where it takes long.

    Returns:
        What has failed on this rank, "" if nothing has. After a failure it goes on with `collect` alone, so that the
        others need not wait for it.
    """
    failure = ""
    with matrix_progress(sum(map(len, jobs)), about) as progress:
        for round_ in itertools.zip_longest(*jobs):
            mine: tuple[str, Value] | None = None
            for rank, name in enumerate(round_):
                collected = None if name is None else collect(name, rank)
                if collected is not None:
                    mine = name, collected
            if mine is not None and not failure:
                try:
                    work(*mine)
                except ValueError as error:
                    failure = str(error)
            mine = collected = None  # before the next comes
            progress.update(sum(name is not None for name in round_))
    return failure
