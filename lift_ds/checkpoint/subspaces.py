"""The subspaces from which "chebyshev" starts at the next refresh, as files of a checkpoint.

Each rank writes those of the matrices it selects in; on loading it takes those it will select in, whichever rank wrote
them. A matrix without one is factored afresh at its next refresh, as after a run with another solver.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn

from lift_ds.checkpoint import rank_files
from lift_ds.model.attachment import require_attachment


def write(model: nn.Module, directory: rank_files.Folder) -> None:
    """Write this rank's subspaces into a checkpoint folder; no file where it has none.

    Args:
        model: the model LIFT is attached to.
        directory: an existing folder.

    Raises:
        OSError: when the file cannot be written.
    """
    rank_files.write(rank_files.SUBSPACES, directory, require_attachment(model).subspaces)


def restore(model: nn.Module, directory: rank_files.Folder) -> None:
    """Take this rank's subspaces out of a checkpoint folder, and forget those it has.

    Args:
        model: the model LIFT is attached to. Where its optimizer is bound, the matrices that this rank selects in are
            known; else all are read.
        directory: a verified checkpoint.
    """
    attachment = require_attachment(model)
    driver = attachment.driver
    own = set(attachment.matrices) if driver is None else set(driver.plan.jobs_of(driver.store.rank))
    paths = rank_files.paths(rank_files.SUBSPACES, directory)
    attachment.subspaces = {name: tensor for path in paths for name, tensor in _read(path, own)}


def _read(path: Path, names: set[str]) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # no mapping
            if name in names:
                yield name, file.get_tensor(name)
