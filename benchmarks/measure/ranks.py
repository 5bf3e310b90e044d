"""Runs a function on ranks, by torch's elastic multiprocessing: each in a fresh process with a log of its own, all
ended when one fails, the limit passes, or whoever wanted them is gone.

On the host ranks are forked from this process, which has imported everything; on GPUs they are spawned, since CUDA
cannot be forked. Where they meet, and who they are, they find in the environment, as torchrun sets it.
"""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std, start_processes

from lift_ds.runtime.ports import free_port
from lift_ds.zero.process_group import unlink_shared_memory

#: Seconds between two looks at the ranks, and that an ended rank has before it is killed.
_INTERVAL, _GRACE = 0.1, 5


class RankError(RuntimeError):
    """Ranks did not come to their end. The first line says which and why, the rest is the end of its output."""


@dataclass(frozen=True)
class Node:
    """The ranks of one machine.

    Args:
        ranks: on all machines together.
        nodes: how many machines.
        number: of this one.
        address: of the first one, where the ranks meet.
        port: where they meet.
    """

    ranks: int
    nodes: int = 1
    number: int = 0
    address: str = "127.0.0.1"
    port: int = field(default_factory=free_port)

    @property
    def local(self) -> int:
        """How many ranks this machine has."""
        return self.ranks // self.nodes

    def rank(self, local: int) -> int:
        """Return the number among all ranks of one of this machine's."""
        return self.number * self.local + local

    def environment(self, local: int) -> dict[str, str]:
        """Return the variables of one of this machine's ranks."""
        return {
            "RANK": str(self.rank(local)), "LOCAL_RANK": str(local), "WORLD_SIZE": str(self.ranks),
            "LOCAL_SIZE": str(self.local), "LOCAL_WORLD_SIZE": str(self.local), "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port), "TORCHELASTIC_RUN_ID": f"node{self.number}",
        }  # fmt: skip


def run_on_ranks(
    job: Callable[..., Any], ranks: int, *arguments: Any, device: str = "cpu", limit: float = 300.0
) -> list[Any]:
    """Run a function on ranks of this machine, one thread each, in fresh processes: DeepSpeed keeps parts of engines.

    Args:
        job: called on each rank, its process group ready; what it returns can be pickled.
        ranks: how many.
        *arguments: for the function.
        device: "cpu" or "cuda".
        limit: seconds after which the run counts as hung.

    Returns:
        What each rank returned, in the order of the ranks.

    Raises:
        RankError: a rank failed or the limit passed. No rank is left running.
    """
    os.environ |= {"DS_ACCELERATOR": device, "GLOO_SOCKET_IFNAME": "lo"}
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as folder:
        return run_on_node(_in_group, (job, arguments, device, limit), Node(ranks), Path(folder), device, limit)


def run_on_node(
    job: Callable[..., Any],
    arguments: tuple[Any, ...],
    node: Node,
    folder: Path,
    device: str,
    limit: float,
    wanted: Callable[[], bool] = lambda: True,
) -> list[Any]:
    """Run a function on the ranks of one machine; it finds its process group by `process_group`.

    Args:
        job: called on each rank; what it returns can be pickled.
        arguments: for the function.
        node: this machine.
        folder: for what the ranks say: node<I>_*/attempt_0/<local rank>/stdout.log and stderr.log.
        device: "cpu" or "cuda".
        limit: seconds after which the ranks are ended.
        wanted: asked all the time; the ranks are ended when it says no.

    Returns:
        What the ranks of this machine returned, in their order.

    Raises:
        RankError: a rank failed, the limit passed, nobody wants them any more, or a signal came. None is left running.
    """
    here, deadline = socket.gethostname(), time.monotonic() + limit
    ranks = start_processes(
        "ranks",
        _rank,
        args=dict.fromkeys(range(node.local), (job, arguments)),
        envs={local: node.environment(local) for local in range(node.local)},
        logs_specs=DefaultLogsSpecs(str(folder), Std.ALL),
        start_method="fork" if device == "cpu" else "spawn",
    )
    try:
        while (ended := ranks.wait(_INTERVAL, _INTERVAL)) is None:
            if time.monotonic() > deadline:
                raise RankError(f"ranks on {here} were not done within {limit:g} s")
            if not wanted():
                raise RankError(f"whoever started the ranks on {here} is gone")
    except SignalException as error:
        raise RankError(f"the ranks on {here} were told to end by {error.sigval.name}") from error
    finally:
        ranks.close(signal.SIGKILL, _GRACE)
    for local, failure in ended.failures.items():
        output = Path(ended.stderrs[local]).read_text(errors="replace").strip()
        why = failure.message["message"] if isinstance(failure.message, dict) else output.rpartition("\n")[2]
        raise RankError(f"rank {node.rank(local)} on {here} ended with {failure.exitcode}: {why}\n{output[-3000:]}")
    return [ended.return_values[local] for local in range(node.local)]


def _rank(job: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    # torch ends ranks by the first, and by the second where their parent is killed: at once, whatever they are in.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    return job(*arguments)


def _in_group(job: Callable[..., Any], arguments: tuple[Any, ...], device: str, limit: float) -> Any:
    with process_group(device, limit, threads=1):
        return job(*arguments)


@contextmanager
def process_group(device: str, limit: float, threads: int) -> Iterator[None]:
    """Let this rank meet the others, by gloo on the host and NCCL on GPUs; all ranks call.

    Args:
        device: "cpu" or "cuda".
        limit: seconds that a collective may take.
        threads: of this rank on the host.
    """
    torch.set_num_threads(threads)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if device == "cuda" else "gloo"
    deepspeed.init_distributed(backend, timeout=timedelta(seconds=limit), auto_mpi_discovery=False, verbose=False)
    unlink_shared_memory()
    yield
    dist.barrier()
    dist.destroy_process_group()
