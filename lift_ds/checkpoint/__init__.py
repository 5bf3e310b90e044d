"""When a checkpoint is whole, what it belongs to, and what happens when a save fails.

Read `commit` first. DeepSpeed's engines are told of it in `lift_ds.zero.engine_checkpoints`.
"""

from lift_ds.checkpoint.commit import (
    DESCRIPTION,
    Choice,
    Layout,
    commit,
    commit_as,
    fault_of,
    last_whole,
    looks_saved,
    newest,
    read,
    verify,
    verify_files,
    withdraw,
)

__all__ = [
    "DESCRIPTION",
    "Choice",
    "Layout",
    "commit",
    "commit_as",
    "fault_of",
    "last_whole",
    "looks_saved",
    "newest",
    "read",
    "verify",
    "verify_files",
    "withdraw",
]
