"""The process group of DeepSpeed's ranks, and the shared memory of its CPU kernel, 68 MB a rank, which nothing in
DeepSpeed removes.
"""

from __future__ import annotations

import os
from pathlib import Path

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

#: How DeepSpeed 0.19 calls it: after the user, where the ranks meet, and the rank.
_NAME = "deepspeed_allreduce_buffer_{user}_{address}_{port}_{rank}"


def init_ranks() -> None:
    """Let DeepSpeed know the process group of this run, and make it where there is none; all ranks call.

    On CPUs Accelerate may have made the group without DeepSpeed, which would take itself to be alone.
    """
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def unlink_shared_memory() -> None:
    """Remove the name of this rank's shared memory, so that it ends with the ranks; all ranks call, one barrier.

    By now every rank has mapped that of the others. Without this each run would keep its memory until the machine
    restarts.
    """
    if get_accelerator().device_name() != "cpu" or not dist.is_initialized():
        return
    dist.barrier()
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    name = _NAME.format(user=os.getuid(), address=address, port=port, rank=dist.get_rank())
    Path("/dev/shm", name).unlink(missing_ok=True)
