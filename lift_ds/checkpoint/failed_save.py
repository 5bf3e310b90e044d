"""A save that fails, as on a full disk: every rank stops with one message, and earlier checkpoints stay as they are."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError

from lift_ds.checkpoint.commit import last_whole
from lift_ds.runtime.ranks import from_all

#: What the writers raise: Python's own, torch's zip writer (which does not say why), safetensors.
WRITER_ERRORS = (OSError, RuntimeError, SafetensorError)

#: A disk with fewer bytes free is full, whatever the writer says.
_FULL = 1 << 20


class SaveError(RuntimeError):
    """A checkpoint that could not be saved; the message names it, the reason and the last whole one."""


def save_error(directory: str | os.PathLike[str], error: BaseException, what: str = "checkpoint") -> SaveError:
    """Say that a checkpoint could not be saved.

    Args:
        directory: of the checkpoint.
        error: what the writer raised.
        what: was to be saved.
    """
    free = shutil.disk_usage(_existing(Path(directory))).free
    full = getattr(error, "errno", None) == errno.ENOSPC or free < _FULL
    reason = "the disk is full" if full else next(iter(str(error).strip().splitlines()), type(error).__name__)
    return SaveError(
        f"{what} {os.fspath(directory)} could not be saved: {reason} ({free:,} bytes are free); "
        f"the last whole checkpoint is {last_whole(directory)}"
    )


def stop_together(failures: list[SaveError]) -> None:
    """Stop every rank if anything failed on one of them; all ranks call, one all-gather.

    Raises:
        SaveError: on every rank, with the message of the lowest rank that failed.
    """
    for message in from_all(str(failures[0]) if failures else None):
        if message is not None:
            raise SaveError(message)


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.absolute().parent)
