"""Runs a function in a process forked from this one, which has imported everything: an import takes longer than a small
run. This process must not have started CUDA, which cannot be forked.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

#: Linux: the signal that a process gets when the one that started it is gone.
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Args:
        code: exit code; minus the signal where one ended it.
        peak_bytes: of its memory on the host, with the libraries that were imported before the fork.
        last_line: of what it wrote.
    """

    code: int
    peak_bytes: int
    last_line: str


def run_forked(body: Callable[[], int | None], log: Path) -> Ended:
    """Run a function in a process of its own, and wait for its end. It ends with this process, however that does.

    Args:
        body: what to run; returns an exit code, None for 0.
        log: file for what it writes.

    Returns:
        How it ended.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        _leave(body, log, parent)
    try:
        _, status, usage = os.wait4(child, 0)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return Ended(os.waitstatus_to_exitcode(status), 1024 * usage.ru_maxrss, lines[-1] if lines else "no output")


def end_with(parent: int) -> None:
    """Have this process end when the one that started it does.

    Args:
        parent: its process id.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _leave(body: Callable[[], int | None], log: Path, parent: int) -> NoReturn:
    """Run the body with its output in a file, and end this process with its exit code."""
    code: object = 1
    try:
        end_with(parent)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = body()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))
