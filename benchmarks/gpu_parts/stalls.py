"""Check of the watchdog: work of the device that does not end is named, and the process ends.

The host runs ahead of the device, so that it may wait anywhere by the time something hangs: the watchdog has to tell
which operation the device has not finished. A process of its own trains a model in whose forward the device is given a
kernel that outlasts the watchdog's limit many times. It ends by itself after a while, should nothing else end it.
"""

from __future__ import annotations

import re
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import lift_ds
from benchmarks.gpu_parts.cells import Batch, Cell, SkippedError
from benchmarks.measure.ranks import Node, RankError, run_on_node
from benchmarks.measure.records import Record
from lift_ds.runtime import watchdog

#: Seconds without progress after which the watchdog ends the process; on the host nothing else takes long.
_STALL_TIMEOUT = {"cuda": 6.0, "cpu": 1.0}
#: Seconds that the kernel lasts, at a clock of 2 GHz; within which the process has to have ended.
_KERNEL_SECONDS, _CYCLES_A_SECOND, _LIMIT = 45.0, 2 * 10**9, 120.0


def batch() -> Batch:
    """Return the check."""
    return Batch([Cell("watchdog: a kernel that does not end is named", check_stall, expected=60.0, limit=180.0)])


def check_stall(device: str) -> Record:
    """Let a process hang, and look at how it ended and what it said."""
    if device == "cuda" and not hasattr(torch.cuda, "_sleep"):
        raise SkippedError("torch has no kernel that waits (torch.cuda._sleep)")
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            run_on_node(hang, (device,), Node(1), Path(folder), device, limit=_LIMIT)
        except RankError as error:
            said = str(error)
        else:
            raise AssertionError("the process ended as if nothing had been wrong")
    ended = f"ended with {watchdog.STALLED}:"
    assert ended in said, f"the process ought to have {ended[:-1]}, the code of a stall: {said}"
    expected = "forward of step 2" + (" (the device has not finished it)" if device == "cuda" else "")
    named = re.search(r"no progress for \d+ s in (.*?)\. Another rank", said)
    assert named, f"the report names no operation: {said}"
    assert named[1] == expected, f"the report names {named[1]!r} instead of {expected!r}"
    return {"named": named[1], "seconds_until_it_ended": round(time.monotonic() - start, 1)}


def hang(device: str) -> None:
    """Train a step, then one in whose forward something does not end; in a process of its own."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from lift_ds.zero.bind import bind

    model: Any = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 16, bias=False)).to(device)
    settings = lift_ds.LiftConfig(density=0.1, lra_rank=4, stall_timeout=_STALL_TIMEOUT[device])
    model = lift_ds.attach(model, settings)
    # Two ranks, as far as anyone asks, since a process alone is not watched; no collective reaches another one.
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    optimizer = lift_ds.LiftAdamW(model)
    bind(model, optimizer)
    x = torch.randn(8, 32, device=device)
    _step(model, optimizer, x)
    model[0].register_forward_hook(lambda *_: _stay(device))
    _step(model, optimizer, x)
    torch.ones(1, device=device).item()  # where the host waits for the device


def _step(model: Any, optimizer: Any, x: torch.Tensor) -> None:
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def _stay(device: str) -> None:
    if device == "cuda":
        torch.cuda._sleep(int(_KERNEL_SECONDS * _CYCLES_A_SECOND))
    else:
        time.sleep(_KERNEL_SECONDS)
