"""The shipped job as a command: what has to happen before its libraries are imported, and how the process ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from lift_ds.training import endings, launcher


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the job, and end this process with its exit code.

    Args:
        argv: command line; that of the process where None.
    """
    launcher.count_local_ranks()  # before DeepSpeed is imported
    try:
        import trl  # noqa: F401
    except ImportError as missing:
        raise SystemExit(f"training needs TRL ({missing}): pip install 'lift_ds[trl]'") from None
    from lift_ds.training.main import run

    endings.end(run(argv))
