"""LIFT sparse fine-tuning (arXiv 2506.00772) as a DeepSpeed optimizer."""

from lift_ds.attach import attach, detach
from lift_ds.config import LiftConfig
from lift_ds.engine import initialize
from lift_ds.optimizer import LiftAdamW
from lift_ds.selection import principal_indices
from lift_ds.trainer import LiftCallback

__version__ = "0.1.0"
__all__ = [
    "LiftAdamW",
    "LiftCallback",
    "LiftConfig",
    "attach",
    "detach",
    "initialize",
    "principal_indices",
]
