"""The subspaces from which "chebyshev" starts at the next refresh, as files of a checkpoint.

Each rank writes those of the matrices it selects in; on loading it takes those it will select in, whichever rank wrote
them. A matrix without one is factored afresh at its next refresh, as after a run with another solver.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lift_ds.model.attachment import require_attachment
from lift_ds.runtime.ranks import rank_and_count

_NAME = "lift_subspaces_rank{:05d}.safetensors"
#: The files of all ranks.
PATTERN = "lift_subspaces_rank*.safetensors"


def write(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write this rank's subspaces into a checkpoint folder; no file where it has none.

    Args:
        model: the model LIFT is attached to.
        directory: an existing folder.

    Raises:
        OSError: when the file cannot be written.
    """
    rank, ranks = rank_and_count()
    for path in Path(directory).glob(PATTERN):  # of an earlier save into this folder, perhaps on more ranks
        if _rank_of(path) == rank or (rank == 0 and _rank_of(path) >= ranks):
            path.unlink()
    subspaces = require_attachment(model).subspaces
    if subspaces:
        try:
            save_file(subspaces, Path(directory) / _NAME.format(rank))
        except SafetensorError as error:
            raise OSError(str(error)) from error


def restore(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Take this rank's subspaces out of a checkpoint folder, and forget those it has.

    Args:
        model: the model LIFT is attached to. Where its optimizer is bound, the matrices that this rank selects in are
            known; else all are read.
        directory: a verified checkpoint.
    """
    attachment = require_attachment(model)
    driver = attachment.driver
    own = set(attachment.matrices) if driver is None else set(driver.plan.jobs_of(driver.store.rank))
    paths = sorted(Path(directory).glob(PATTERN))
    attachment.subspaces = {name: tensor for path in paths for name, tensor in _read(path, own)}


def _rank_of(path: Path) -> int:
    return int(path.stem.removeprefix("lift_subspaces_rank"))


def _read(path: Path, names: set[str]) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # no mapping
            if name in names:
                yield name, file.get_tensor(name)
