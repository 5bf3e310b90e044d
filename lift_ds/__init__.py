"""LIFT sparse fine-tuning (arXiv 2506.00772) as a DeepSpeed optimizer.

What needs torch alone is imported at once; what needs DeepSpeed or transformers when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lift_ds.config import LiftConfig
from lift_ds.model.attach import attach, detach
from lift_ds.optimizer import LiftAdamW
from lift_ds.reference_model import ReferenceModel
from lift_ds.refresh.changes import ChangedEntries, applied_steps, base_weights, changed_entries
from lift_ds.refresh.gradients import select_by_gradients
from lift_ds.refresh.report import RefreshReport, refreshes
from lift_ds.selection import principal_indices

if TYPE_CHECKING:
    from lift_ds.trainer import LiftCallback
    from lift_ds.zero.bind import bind
    from lift_ds.zero.engine import initialize

__version__ = "0.1.0"
__all__ = [
    "ChangedEntries",
    "LiftAdamW",
    "LiftCallback",
    "LiftConfig",
    "ReferenceModel",
    "RefreshReport",
    "applied_steps",
    "attach",
    "base_weights",
    "bind",
    "changed_entries",
    "detach",
    "initialize",
    "principal_indices",
    "refreshes",
    "select_by_gradients",
]

#: Name -> the module that has it.
_LATER = {
    "LiftCallback": "lift_ds.trainer",
    "bind": "lift_ds.zero.bind",
    "initialize": "lift_ds.zero.engine",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'lift_ds' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_LATER[name]), name)
    except ModuleNotFoundError as missing:
        package = (missing.name or "").split(".")[0]
        if package == "lift_ds":
            raise
        raise ImportError(f"lift_ds.{name} needs {package}, which is not installed: pip install {package}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
