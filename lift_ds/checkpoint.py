"""What a checkpoint belongs to: a description beside it, and a check against it before anything is loaded."""

from __future__ import annotations

import json
import os
from typing import Any

from torch import nn

from lift_ds.attachment import require_attachment
from lift_ds.config import read_json_object
from lift_ds.layers import logical_shape

#: Name of the description inside a checkpoint folder.
DESCRIPTION = "lift.json"

#: Settings that may differ between the run that saved and the run that resumes: they change how, not what.
_FREE_SETTINGS = frozenset(
    {
        "solver",
        "index_placement",
        "refresh_memory_gib",
        "refresh_interval",
        "lr",
        "betas",
        "eps",
        "weight_decay",
        "stall_timeout",
    }
)


def describe(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the description of a LIFT model into a checkpoint folder; for one rank to call.

    Args:
        model: the model LIFT is attached to.
        directory: an existing folder.
    """
    path = os.path.join(directory, DESCRIPTION)
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        json.dump(_description(model), file, indent=1)
    os.replace(path + ".tmp", path)


def verify(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Check that a checkpoint was saved by a run of this model with these settings.

    Args:
        model: the model LIFT is attached to.
        directory: the checkpoint folder.

    Raises:
        ValueError: when the folder or its description is missing, or it describes another model or another
            selection; the message names the file and the difference.
    """
    path = os.path.join(directory, DESCRIPTION)
    if not os.path.isdir(directory):
        raise ValueError(f"checkpoint folder {os.fspath(directory)!r} does not exist")
    if not os.path.isfile(path):
        raise ValueError(f"{path} is missing: the folder is no LIFT checkpoint, or one that was not written to its end")
    saved = read_json_object(path)
    current = _description(model)
    if not saved.keys() >= current.keys():
        raise ValueError(f"{path}: not a description of a LIFT checkpoint")
    if saved["format"] != current["format"]:
        raise ValueError(f"{path}: format {saved['format']!r}, this version reads {current['format']}")
    _compare_layers(path, saved["matrices"], current["matrices"])
    for key, value in current["config"].items():
        if key not in _FREE_SETTINGS and saved["config"].get(key) != value:
            raise ValueError(f"{path}: saved with {key}={saved['config'].get(key)!r}, this run has {key}={value!r}")


def _description(model: nn.Module) -> dict[str, Any]:
    attachment = require_attachment(model)
    matrices = {
        name: {"shape": list(logical_shape(layer.weight)), "entries": layer.entries()}
        for name, layer in attachment.layers.items()
    }
    return {"format": 1, "config": attachment.config.to_dict(), "matrices": matrices}


def _compare_layers(path: str, saved: dict[str, Any], current: dict[str, Any]) -> None:
    for name in {**saved, **current}:
        if name not in current:
            raise ValueError(f"{path}: a checkpoint of another model: it has the matrix {name}, this model does not")
        if name not in saved:
            raise ValueError(f"{path}: a checkpoint of another model: it lacks the matrix {name}")
        if saved[name] != current[name]:
            raise ValueError(
                f"{path}: a checkpoint of another model or budget: {name} has shape {saved[name]['shape']} and "
                f"{saved[name]['entries']} entries there, {current[name]['shape']} and {current[name]['entries']} here"
            )
