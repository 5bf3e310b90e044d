"""Files and folders that are there whole or not at all, whenever the process ends."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
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


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path to write a file at, which takes its name when it is done; after an error nothing of it is left.

    Args:
        path: of the file. One that is there stays until the new one is whole.
    """
    path = Path(path).absolute()
    unfinished = path.with_name(f"{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        yield unfinished
        settle(unfinished)
        os.replace(unfinished, path)
        settle(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a folder to write in, which takes its name when it is done; after an error nothing of it is left.

    Args:
        path: of the folder. There must be none of this name, or an empty one.
    """
    path = Path(path).absolute()
    unfinished = path.with_name(f"{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        unfinished.mkdir()
        yield unfinished
        for file in unfinished.iterdir():
            settle(file)
        os.replace(unfinished, path)
        settle(path.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
