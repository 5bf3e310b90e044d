"""The package's logger: it needs no set-up, lets rank 0 speak for all, and leaves progress bars whole."""

from __future__ import annotations

import logging
import os
import sys

import torch.distributed as dist
from tqdm import tqdm

#: A selection in many matrices that takes longer than this shows its progress.
_PROGRESS_AFTER_SECONDS = 10.0


def is_main_rank() -> bool:
    """Tell whether this process speaks for the run: global rank 0, or a run of one process."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return int(os.environ.get("RANK", "0")) == 0


class _ProgressBarHandler(logging.Handler):
    """Writes above progress bars instead of through them."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def get_logger() -> logging.Logger:
    """Return the logger "lift_ds", at level INFO; of the ranks other than 0 it shows errors only.

    A handler is added only where the application has not set one on this logger.
    """
    logger = logging.getLogger("lift_ds")
    if not logger.handlers:
        handler = _ProgressBarHandler()
        handler.setFormatter(logging.Formatter("[lift_ds] %(message)s"))
        handler.addFilter(lambda record: record.levelno >= logging.ERROR or is_main_rank())
        logger.addHandler(handler)
        logger.propagate = False
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    return logger


def matrix_progress(matrices: int, about: str) -> tqdm:
    """Return a progress bar that rank 0 shows when a selection takes long.

    Args:
        matrices: how many there are.
        about: what is done.
    """
    return tqdm(
        total=matrices,
        desc=about,
        unit="matrix",
        delay=_PROGRESS_AFTER_SECONDS,
        leave=False,
        disable=not is_main_rank(),
    )
