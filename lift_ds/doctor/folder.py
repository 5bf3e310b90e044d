"""The output folder as this node sees it."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from pathlib import Path
from typing import Any

from lift_ds.doctor.limits import within
from lift_ds.training import rendezvous

#: Bytes that are written to learn a speed, in pieces, and seconds after which no further piece is written.
_MOST, _PIECE, _ENOUGH = 64 << 20, 4 << 20, 2.0

#: Seconds within which a folder has to answer.
_LIMIT = 40.0


def leave_mark(folder: Path) -> dict[str, Any]:
    """Write the file that the other nodes look for; for rank 0.

    Args:
        folder: is made where it is missing; `remove` takes it away again.

    Returns:
        "mark": the file's name; "made": the folders that were made, innermost first; or "error".
    """
    made = [str(path) for path in (folder, *folder.parents) if not path.exists()]
    try:
        return {"mark": within(_LIMIT, lambda: rendezvous.leave_mark(folder), f"writing to {folder}"), "made": made}
    except OSError as error:
        return {"error": _reason(error), "made": made}


def remove(folder: Path, left: dict[str, Any]) -> None:
    """Remove what `leave_mark` made.

    Args:
        folder: where.
        left: what it returned.
    """
    with contextlib.suppress(OSError):
        if "mark" in left:
            (folder / left["mark"]).unlink(missing_ok=True)
        for path in left["made"]:
            Path(path).rmdir()


def look(folder: Path, mark: str, *, timed: bool) -> dict[str, Any]:
    """Find out whether this node sees the mark of rank 0, can write beside it, and how fast.

    Args:
        folder: the output folder.
        mark: the file that rank 0 wrote there.
        timed: whether to learn the speed too.

    Returns:
        "seen"; "rate" in bytes a second where it was asked for; "error" where it cannot be written to.
    """
    try:
        if not within(_LIMIT, lambda: rendezvous.sees_mark(folder / mark), f"reading {folder}"):
            return {"seen": False}
        rate = within(_LIMIT, lambda: write_rate(folder, _MOST if timed else 1), f"writing to {folder}")
        return {"seen": True, "rate": rate if timed else None}
    except OSError as error:
        return {"seen": True, "error": _reason(error)}


def write_rate(folder: Path, most: int) -> float:
    """Return the bytes a second at which a file reaches the disk.

    Args:
        folder: where it is written; it is removed again.
        most: bytes to write; fewer where that takes long.
    """
    path = folder / f".doctor-{uuid.uuid4().hex}"
    piece = os.urandom(min(most, _PIECE))  # file systems that compress would store zeros in no time
    try:
        began = time.monotonic()
        written = 0
        with open(path, "wb", buffering=0) as file:
            while written < most and (written == 0 or time.monotonic() - began < _ENOUGH):
                written += file.write(piece)
            os.fsync(file.fileno())
        return written / max(time.monotonic() - began, 1e-9)
    finally:
        path.unlink(missing_ok=True)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
