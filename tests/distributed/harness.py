"""Runs a worker script on real gloo ranks and hands back what each rank saved."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from segments import remove_segments

from lift_ds.runtime.ports import free_port

WORKERS = Path(__file__).parent / "workers"

#: Longest time a launch may take, including DeepSpeed's JIT builds on a fresh machine.
LIMIT_SECONDS = 400


def rank_environment(world_size: int) -> dict[str, str]:
    """Environment of the ranks: one thread each, and the device count that DeepSpeed reads on the CPU."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "LOCAL_SIZE": str(world_size),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def run_ranks(worker: str, world_size: int, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Run `workers/<worker>.py` on ranks of one machine.

    Args:
        worker: name of the script; it is given the folder, then the arguments, and saves `rank<R>.pt` in the folder.
        world_size: how many ranks.
        folder: an existing folder for results.
        *arguments: further arguments of the script.

    Returns:
        What each rank saved, in the order of the ranks.
    """
    port = free_port()
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc_per_node={world_size}"]
    command += ["--master_addr=127.0.0.1", f"--master_port={port}", str(WORKERS / f"{worker}.py"), str(folder)]
    try:
        result = subprocess.run(
            [*command, *arguments],
            env=rank_environment(world_size),
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
            check=False,
        )
    finally:
        remove_segments(port)
    assert result.returncode == 0, (
        f"{worker} on {world_size} ranks failed:\n{result.stdout[-4000:]}\n{result.stderr[-8000:]}"
    )
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world_size)]
