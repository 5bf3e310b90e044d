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
    """Say what went wrong on this rank, and return the exit code. A lost rank takes one line, all else a traceback."""
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
    """Run the exit handlers and end this process, without taking Python's interpreter down.

    Threads of gloo live on where DeepSpeed still refers to the process group. When the interpreter goes down under
    them, a finished run can abort (exit code -6, seen once in some hundred launches).
    """
    atexit._run_exitfuncs()
    leave(code)


def leave(code: int) -> NoReturn:
    """End this process at once. An orderly end could wait for ever for ranks that are gone."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def refuse(error: Exception, code: int = REFUSED) -> int:
    """Say what is wrong, and return the exit code.

    Other ranks wait for rank 0 to say it, which ends them. One that is still there met an error of its own.
    """
    leave_first_word_to_rank_0()
    print(f"error: {error}", file=sys.stderr, flush=True)
    return code


def leave_first_word_to_rank_0() -> None:
    """On any rank but 0: wait. The launcher ends all ranks when rank 0 has spoken and ended."""
    if not is_main_rank():
        time.sleep(_GRACE)
