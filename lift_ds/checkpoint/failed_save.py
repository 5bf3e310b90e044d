"""A save that fails, as on a full disk: every rank stops with one message, and earlier checkpoints stay as they are.

A rank that stopped in the middle of DeepSpeed's save would leave the others waiting in its next collective. So what
fails is kept until the save has run to its end on every rank, and then told to all of them.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lift_ds.checkpoint import manifest
from lift_ds.checkpoint.commit import last_whole
from lift_ds.ranks import from_all, rank_and_count

#: What the writers raise: Python's own, torch's zip writer (which does not say why), safetensors.
WRITER_ERRORS = (OSError, RuntimeError, SafetensorError)

#: DeepSpeed's file beside the checkpoints that names the one saved last.
LATEST = "latest"

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


@contextmanager
def failures_kept(engine: Any, directory: str | os.PathLike[str]) -> Iterator[list[SaveError]]:
    """Let a DeepSpeed engine save to its end, whatever its writers raise on this rank.

    What fails between them ends in a `SaveError` at once: the other ranks are left behind in the middle of the save, so
    nothing can be agreed on any more.

    Args:
        engine: DeepSpeed's engine.
        directory: of the checkpoint.

    Yields:
        What has failed so far; to be given to `stop_together` after the save.
    """
    failures: list[SaveError] = []

    def kept(write: Any) -> Any:
        def write_or_keep(*args: Any, **kwargs: Any) -> Any:
            try:
                return write(*args, **kwargs)
            except WRITER_ERRORS as error:
                failures.append(save_error(directory, error))

        return write_or_keep

    def save_checkpoint(save_dir: str, *args: Any, **kwargs: Any) -> None:
        try:
            whole_save(save_dir, *args, **{**kwargs, "save_latest": False})
        except WRITER_ERRORS as error:
            raise save_error(directory, error) from error
        if rank_and_count()[0] == 0:  # DeepSpeed writes this name before its last barrier, unguarded
            kept(manifest.write_whole)(Path(save_dir) / LATEST, f"global_step{engine.global_steps}")

    writer, whole_save = engine.checkpoint_engine, engine.save_checkpoint
    save, copy_script = writer.save, engine._copy_recovery_script
    writer.save, engine._copy_recovery_script = kept(save), kept(copy_script)
    engine.save_checkpoint = save_checkpoint
    try:
        yield failures
    finally:
        writer.save, engine._copy_recovery_script = save, copy_script
        engine.save_checkpoint = whole_save


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
