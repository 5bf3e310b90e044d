"""Processes forked from one that has imported everything: real ranks and real gloo without the imports, which take most
of a launch. The process that forks must not have started a thread or a process group.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from segments import remove_segments

from lift_ds.runtime.ports import free_port


@dataclass(frozen=True)
class Ended:
    """How a forked process ended: its exit code (None: it was ended at its limit), what it wrote, how long it took."""

    code: int | None
    output: str
    seconds: float


def alone(body: Callable[[], object], log: Path, limit: float) -> Ended:
    """Run something in a process of its own.

    Args:
        body: what to run; returns an exit code or None.
        log: file for what it writes.
        limit: seconds after which it is ended.

    Returns:
        How it ended.
    """
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        _leave(body, log)
    ended = False
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = None if ended else os.waitstatus_to_exitcode(status)
            return Ended(code, log.read_text(errors="replace"), time.monotonic() - began)
        if time.monotonic() - began > limit and not ended:
            os.kill(child, signal.SIGKILL)
            ended = True
        time.sleep(0.02)


def _leave(body: Callable[[], object], log: Path) -> NoReturn:
    """Run the body with its output in a file, and end this process with its exit code."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    code: object = 1
    try:
        code = body()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


class Group:
    """The ranks of one run.

    Args:
        body: what a rank does, given its number; returns its exit code.
        ranks: how many.
        folder: for what they say, `rank<R>.log` each.
    """

    def __init__(self, body: Callable[[int], int | None], ranks: int, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._port = free_port()
        self._codes: dict[int, int] = {}
        self.ended: dict[int, float] = {}  # rank -> time of day
        sys.stdout.flush()
        sys.stderr.flush()
        self.pids = [self._fork(body, rank, ranks) for rank in range(ranks)]

    def _fork(self, body: Callable[[int], int | None], rank: int, ranks: int) -> int:
        child = os.fork()
        if child:
            return child
        os.setsid()
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_SIZE=str(ranks),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(self._port),
        )  # fmt: skip
        _leave(lambda: body(rank), self.folder / f"rank{rank}.log")

    def poll(self) -> dict[int, int]:
        """Return the exit codes of the ranks that have ended (minus the signal where one ended it)."""
        for rank, pid in enumerate(self.pids):
            if rank not in self._codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self._codes[rank] = os.waitstatus_to_exitcode(status)
                    self.ended[rank] = time.time()
        return self._codes

    def wait(self, ranks: list[int], limit: float) -> bool:
        """Wait until these ranks have ended; tell whether they have within so many seconds."""
        deadline = time.monotonic() + limit
        while not set(ranks) <= self.poll().keys():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def send(self, rank: int, number: signal.Signals) -> None:
        """Signal a rank, if it still runs."""
        if rank not in self.poll():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[rank], number)

    def end(self) -> None:
        """Kill what is left, and remove what that leaves."""
        for rank in range(len(self.pids)):
            self.send(rank, signal.SIGKILL)
        self.wait(list(range(len(self.pids))), 20)
        remove_segments(self._port)

    def said(self, rank: int) -> str:
        """Return what a rank has written."""
        return (self.folder / f"rank{rank}.log").read_text(errors="replace")
