"""Runs a function on gloo ranks, forked from a process that has imported everything; says what it ran on."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import deepspeed
import torch
import torch.distributed as dist
from records import RESULTS, surroundings, write_json

__all__ = ["RESULTS", "run_on_ranks", "write_results"]

Results = dict[str, Any]


def run_on_ranks(job: Callable[..., Results], ranks: int, *arguments: Any, limit: float = 300.0) -> list[Results]:
    """Run a function on ranks of one thread each, in fresh processes: DeepSpeed keeps parts of earlier engines alive.

    Args:
        job: called on each rank, its process group ready; returns plain JSON values.
        ranks: how many.
        *arguments: for the function.
        limit: seconds after which the run counts as hung.

    Returns:
        What each rank returned, in the order of the ranks.

    Raises:
        RuntimeError: when a rank fails or the limit passes; with the end of its output. No rank is left running.
    """
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        processes = [fork.Process(target=_rank, args=(job, rank, ranks, folder, arguments)) for rank in range(ranks)]
        for process in processes:
            process.start()
        _wait(processes, limit)
        # DeepSpeed leaves the shared memory of its ranks behind, named by address and port.
        for segment in Path("/dev/shm").glob(f"deepspeed_*_localhost_{os.getpid()}_*"):
            segment.unlink(missing_ok=True)
        logs = [Path(folder, f"rank{rank}.log") for rank in range(ranks)]
        for process, log in zip(processes, logs, strict=True):
            if process.exitcode != 0:
                text = log.read_text(errors="replace")[-3000:] if log.exists() else ""
                raise RuntimeError(
                    f"{log.stem} of {ranks} ended with {process.exitcode} (limit {limit:.0f} s):\n{text}"
                )
        return [json.loads(log.with_suffix(".json").read_text()) for log in logs]


def _wait(processes: list[Any], limit: float) -> None:
    """Wait until all ranks are done, one has failed or the time is up; then end what still runs."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline and any(process.is_alive() for process in processes):
        if any(process.exitcode for process in processes):
            break
        time.sleep(0.05)
    for process in processes:
        if process.is_alive():
            process.terminate()
            process.join(10)
        if process.is_alive():
            process.kill()
        process.join()


def _rank(job: Callable[..., Results], rank: int, ranks: int, folder: str, arguments: tuple[Any, ...]) -> None:
    log = os.open(f"{folder}/rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(os.getppid()),
    }  # fmt: skip
    torch.set_num_threads(1)
    deepspeed.init_distributed(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=timedelta(seconds=120)
    )
    results = job(*arguments)
    Path(f"{folder}/rank{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def write_results(path: Path, results: Results) -> None:
    """Write one result file, its surroundings first."""
    around = surroundings(("deepspeed", "transformers", "peft"), backend="gloo", threads_per_rank=1)
    write_json(path, {**around, **results})
