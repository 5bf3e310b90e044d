"""Files that are there whole or not at all, whenever the process ends."""

from __future__ import annotations

import os
from pathlib import Path

#: What a file that is about to replace another is called until it does.
UNFINISHED = ".tmp"


def settle(path: str | os.PathLike[str]) -> None:
    """Have the operating system put a file on the disk before this returns, so that it survives a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write a small text file; a reader finds the one before or this one, whole."""
    path = Path(path)
    unfinished = path.with_name(path.name + UNFINISHED)
    with open(unfinished, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    settle(path.parent)  # the new name lives in the folder
