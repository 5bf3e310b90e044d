"""How a run of the shipped job ends on this rank: what it says, and its exit code."""

from __future__ import annotations

import atexit
import os
import sys
import time
import traceback
from typing import NoReturn

import torch.distributed as dist
from tqdm import tqdm

from lift_ds.runtime import watchdog
from lift_ds.runtime.logs import is_main_rank

#: Exit codes: an error; settings or data that cannot be used; a checkpoint or the model that could not be saved;
#: Ctrl-C. For a lost rank see `lift_ds.runtime.watchdog`.
FAILED, REFUSED, UNSAVED, INTERRUPTED = 1, 2, 74, 130

#: Seconds the other ranks wait for the launcher to end them once rank 0 has said what is wrong.
_GRACE = 20.0


def has_peers() -> bool:
    """Tell whether other ranks take part in this run."""
    return dist.is_initialized() and dist.get_world_size() > 1


def report(error: Exception) -> int:
    """Say what went wrong on this rank, in one line where it is that another rank is gone; give the exit code."""
    if not watchdog.is_lost_rank(error):
        traceback.print_exception(error)
        return FAILED
    where = watchdog.named_operation(error) or watchdog.current() or "what the Trainer does between steps"
    what = str(error).strip().splitlines()[0].split(". ")[0]
    tqdm.write(  # not into the line of a progress bar
        f"error: rank {dist.get_rank()}: another rank is gone or does not answer; noticed in {where}: "
        f"{what}. The same command with --resume_from_checkpoint auto continues",
        file=sys.stderr,
    )
    return watchdog.LOST_RANK


def end(code: int) -> NoReturn:
    """End this process when its work is done, without what Python does last.

    Threads of gloo outlive the process group where DeepSpeed still refers to it, and taking the interpreter down under
    them has aborted a finished run (exit code -6, once in some hundred launches).
    """
    atexit._run_exitfuncs()
    leave(code)


def leave(code: int) -> NoReturn:
    """End this process now: others may be waiting in a collective, or be gone, and an orderly end wait for them."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def refuse(error: Exception, code: int = REFUSED) -> int:
    """Say what is wrong, once; give the exit code.

    One that is still there after rank 0 had the first word met an error of its own, and says so.
    """
    leave_first_word_to_rank_0()
    print(f"error: {error}", file=sys.stderr, flush=True)
    return code


def leave_first_word_to_rank_0() -> None:
    """Wait on the other ranks: the launcher ends all of them with the first that ends."""
    if not is_main_rank():
        time.sleep(_GRACE)
