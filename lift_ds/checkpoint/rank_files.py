"""Files of a checkpoint of which each rank writes its own: tensors by name, in safetensors.

On loading each rank takes what it needs, whichever rank wrote it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lift_ds.runtime.ranks import rank_and_count

Folder = str | os.PathLike[str]

#: How the names of all such files begin, and end before their number.
SUBSPACES, CHANGES = "lift_subspaces_rank", "lift_changes_rank"


def write(kind: str, directory: Folder, tensors: Mapping[str, Tensor], texts: Mapping[str, str] | None = None) -> None:
    """Write this rank's file into a checkpoint folder; no file where it has no tensors and no texts.

    Args:
        kind: of the files.
        directory: an existing folder.
        tensors: name -> tensor.
        texts: name -> text.

    Raises:
        OSError: when the file cannot be written.
    """
    rank, ranks = rank_and_count()
    for path in paths(kind, directory):  # of an earlier save into this folder, perhaps on more ranks
        number = int(path.stem.removeprefix(kind))
        if number == rank or (rank == 0 and number >= ranks):
            path.unlink()
    if tensors or texts:
        try:
            save_file(dict(tensors), Path(directory) / f"{kind}{rank:05d}.safetensors", dict(texts or {}))
        except SafetensorError as error:
            raise OSError(str(error)) from error


def paths(kind: str, directory: Folder) -> list[Path]:
    """Return the files of all ranks in a checkpoint folder."""
    return sorted(Path(directory).glob(f"{kind}*.safetensors"))
