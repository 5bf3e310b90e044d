"""LIFT sparse fine-tuning (arXiv 2506.00772) as a DeepSpeed optimizer."""

from lift_ds.attach import attach, detach
from lift_ds.config import LiftConfig
from lift_ds.engine import initialize
from lift_ds.optimizer import LiftAdamW
from lift_ds.refresh import RefreshReport, refreshes
from lift_ds.selection import principal_indices
from lift_ds.trainer import LiftCallback
from lift_ds.zero.facade import bind

__version__ = "0.1.0"
__all__ = [
    "LiftAdamW",
    "LiftCallback",
    "LiftConfig",
    "RefreshReport",
    "attach",
    "bind",
    "detach",
    "initialize",
    "principal_indices",
    "refreshes",
]
