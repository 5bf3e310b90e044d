"""The shared memory of DeepSpeed's CPU kernel, 68 MB a rank, which nothing in DeepSpeed removes."""

from __future__ import annotations

import os
from pathlib import Path

import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

#: How DeepSpeed 0.19 calls it: after the user, where the ranks meet, and the rank.
_NAME = "deepspeed_allreduce_buffer_{user}_{address}_{port}_{rank}"


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
