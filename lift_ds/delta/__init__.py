"""What training changed, as a file: deltas of saved models, and adapters of PEFT made of them.

Read `file` first, which says what a delta holds; then `export` and `apply`.
"""

from lift_ds.delta.adapters import export_adapter
from lift_ds.delta.apply import TunedModel, apply_deltas
from lift_ds.delta.export import export_delta
from lift_ds.delta.file import DeltaFile, is_delta
from lift_ds.delta.model_files import ModelFiles
from lift_ds.delta.patches import CheckpointWeightPatch, read_patches
from lift_ds.delta.summary import Summary, headline, inspect_delta, summary_of

__all__ = [
    "CheckpointWeightPatch",
    "DeltaFile",
    "ModelFiles",
    "Summary",
    "TunedModel",
    "apply_deltas",
    "export_adapter",
    "export_delta",
    "headline",
    "inspect_delta",
    "is_delta",
    "read_patches",
    "summary_of",
]
