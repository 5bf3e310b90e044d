"""The watchdog: a rank that waits for others which are gone stops and says where, instead of waiting for ever.

A collective whose peer has died or stopped may return an error (gloo, when the connection closes), or never return (a
stopped process, a lost network, NCCL). So each rank notes the operation it is in, which costs two assignments and no
device synchronisation, and a thread of its own ends the process when one operation lasts too long:

    begin("backward of step 7") ... end()          the operation itself
    with during("refresh at step 8"):              parts within it; each beginning and end counts as progress
        with during("selecting in layers.0.q"):
            ...

On an accelerator the host runs ahead and waits elsewhere, perhaps in code that is not ours. There the end of an
operation also records an event, and the operation is over when the device has passed it.

What lies between operations (loading data, the user's own code) is not limited. There is one watchdog for the whole
process, since a process hangs as a whole.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from lift_ds.runtime.logs import get_logger

logger = get_logger()

#: Exit codes: an operation lasted longer than `stall_timeout`; a collective reported that another rank is gone.
#: Both call for the same command line once more.
STALLED, LOST_RANK = 75, 76

#: What collectives say when a peer is gone, where they raise no error of a class of its own (gloo).
_LOST_PHRASES = ("gloo", "nccl", "connection closed by peer", "connection reset by peer")

#: Seconds that the report may take: standard error may be blocked too.
_REPORT_SECONDS = 5.0

#: Most operations whose end on the device is remembered at a time.
_MOST_PENDING = 1000


@dataclass
class _Pending:
    """An operation that is over on the host; the event tells when it is over on the device."""

    operation: str
    event: Any
    device: int


#: Seconds that collectives may take beyond `stall_timeout`: the watch ends a run first, as it says more.
_LATER = 10

_YEAR = 365 * 24 * 3600


def limit_of_collectives(stall_timeout: float | None) -> int:
    """Return the seconds after which a collective is to be an error by itself, for those that nothing watches.

    Args:
        stall_timeout: seconds that one operation may last; None for any time, and then a year for collectives.
    """
    return _YEAR if stall_timeout is None else math.ceil(stall_timeout) + _LATER


@dataclass
class _Watched:
    """What the watched thread writes and the watching thread reads; each field is replaced as a whole."""

    stack: tuple[str, ...] = ()
    changes: int = 0  # counts beginnings and ends: the sign of progress
    pending: deque[_Pending] = field(default_factory=deque)
    on_device: bool = False


_watched = _Watched()
_limit: float | None = None
_thread: threading.Thread | None = None


def start(stall_timeout: float | None) -> None:
    """Watch this process from now on, if it has peers; the latest limit counts.

    Args:
        stall_timeout: seconds that one operation may last; None for any time.
    """
    global _limit, _thread
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    _limit = stall_timeout
    # Gloo's collectives are the host's own.
    _watched.on_device = stall_timeout is not None and torch.accelerator.is_available() and dist.get_backend() != "gloo"
    if stall_timeout is not None and _thread is None:
        _thread = threading.Thread(target=_keep_watch, name="lift_ds watch", daemon=True)
        _thread.start()


def begin(operation: str) -> None:
    """Note that an operation begins; it replaces whatever was noted, so that an error leaves nothing behind."""
    _enter((operation,))


def end() -> None:
    """Note that the operation is over on the host."""
    if _watched.on_device and _watched.stack:
        _mark_end(_watched.stack[0])
    _enter(())


@contextlib.contextmanager
def during(operation: str, *, whole: bool = False) -> Iterator[None]:
    """Note an operation, or a part of the one that is noted; an error that tells of a lost rank gains its name.

    Args:
        operation: what to call it.
        whole: an operation of its own, as by `begin` and `end`.
    """
    outer = () if whole else _watched.stack
    _enter((*outer, operation))
    try:
        yield
    except Exception as error:
        name_operation(error)
        raise
    finally:
        if whole:
            end()
        else:
            _enter(outer)


def current() -> str:
    """Return what this process is in, "" between operations."""
    return ", ".join(_watched.stack)


def is_lost_rank(error: BaseException) -> bool:
    """Tell whether an error, or the one it was raised from, says that another rank is gone or does not answer."""
    if isinstance(error, dist.DistError) or (error.__cause__ is not None and is_lost_rank(error.__cause__)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(phrase in text for phrase in _LOST_PHRASES)


def name_operation(error: BaseException) -> None:
    """Add to an error that tells of a lost rank what this rank was in; the innermost operation is named once."""
    if is_lost_rank(error) and current() and not named_operation(error):
        error.add_note(f"{_NOTE}{current()}")


_NOTE = "another rank is gone or does not answer; noticed in "


def named_operation(error: BaseException) -> str:
    """Return the operation an error was met in, "" where none is known."""
    return next((note.removeprefix(_NOTE) for note in getattr(error, "__notes__", ()) if note.startswith(_NOTE)), "")


def _enter(stack: tuple[str, ...]) -> None:
    _watched.stack = stack
    _watched.changes += 1


def _mark_end(operation: str) -> None:
    if len(_watched.pending) < _MOST_PENDING:
        event = torch.Event(device=torch.accelerator.current_accelerator())
        event.record()
        _watched.pending.append(_Pending(operation, event, torch.accelerator.current_device_index()))


def _keep_watch() -> None:
    """Tick; end the process when one operation has seen no progress for the limit.

    Only the time in which this thread itself ran counts: a job that was suspended as a whole goes on afterwards.
    """
    waited, seen = 0.0, (-1, "")
    before = time.monotonic()
    while True:
        limit = _limit
        tick = 5.0 if limit is None else min(5.0, limit / 10)
        time.sleep(tick)
        now = time.monotonic()
        ran, before = min(now - before, 2 * tick), now
        state, operation = _progress()
        waited = waited + ran if operation and state == seen[0] and operation == seen[1] else 0.0
        seen = state, operation
        if limit is not None and waited > limit:
            _give_up(operation, waited, limit)


def _progress() -> tuple[int, str]:
    """Return a number that changes with progress, and the operation that is under way ("" between operations)."""
    oldest = _oldest_on_device()
    if oldest is not None:
        return id(oldest), f"{oldest.operation} (the device has not finished it)"
    return _watched.changes, current()


def _oldest_on_device() -> _Pending | None:
    """Return the oldest operation that the device has not finished, after forgetting those that it has."""
    pending = _watched.pending
    while pending:
        if not _device_finished(pending[0]):
            return pending[0]
        pending.popleft()
    return None


def _device_finished(pending: _Pending) -> bool:
    # Without it, a look at an event would make this thread set up the first device.
    torch.accelerator.set_device_index(pending.device)
    try:
        return pending.event.query()
    except RuntimeError:  # a broken device: the watched thread will meet the error itself
        return True


def _give_up(operation: str, waited: float, limit: float) -> None:
    reporter = threading.Thread(target=_report, args=(operation, waited, limit), daemon=True)
    reporter.start()
    reporter.join(_REPORT_SECONDS)
    os._exit(STALLED)


def _report(operation: str, waited: float, limit: float) -> None:
    rank = dist.get_rank() if dist.is_initialized() else os.environ.get("RANK", "?")
    logger.error(
        "rank %s: no progress for %.0f s in %s. Another rank has died, stopped or lost its connection; this rank ends "
        "with exit code %d; launch/train.py continues by the same command with --resume_from_checkpoint auto. If "
        "nothing is wrong and this takes so long (a save to a slow disk, say), raise stall_timeout (%g seconds now)",
        rank, waited, operation, STALLED, limit,
    )  # fmt: skip
    main = threading.main_thread().ident
    frame = sys._current_frames().get(main) if main is not None else None
    if frame is not None:
        # What the main thread waits in, innermost last.
        logger.error("rank %s is in:\n%s", rank, "".join(traceback.format_stack(frame)[-6:]).rstrip())
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
