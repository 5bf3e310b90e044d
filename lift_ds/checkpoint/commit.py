"""When a checkpoint is whole, and what it belongs to: the description that commits it, checked before loading.

    CHECKPOINT/            a folder that DeepSpeed or the Trainer has filled
      ...                  their files
      lift.json            written last: which model and settings, and the size and checksum of every file

A folder without `lift.json` is an interrupted save. Writing and checking are shared between the ranks: each hashes a
part of the files, and all of them learn what any of them found.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from lift_ds.checkpoint import changes, manifest, subspaces
from lift_ds.config import LiftConfig
from lift_ds.model.attachment import require_attachment
from lift_ds.model.partition import logical_shape
from lift_ds.runtime.files import settle
from lift_ds.runtime.logs import get_logger
from lift_ds.runtime.ranks import by_main, deal_out, from_all, rank_and_count, together

logger = get_logger()

#: Name of the description inside a checkpoint folder.
DESCRIPTION = "lift.json"

#: Version of its layout.
FORMAT = 2

#: Files that one rank reads at a time.
_READERS = 4

#: What holds tensors, and would be loaded if it were put into a checkpoint.
_STATES = (".pt", ".pth", ".bin", ".safetensors")

#: Settings that may differ between the run that saved and the run that resumes: they change how, not what.
_FREE_SETTINGS = frozenset(
    {
        "solver",
        "selection_tolerance",
        "seed",
        "refresh_parts",
        "index_placement",
        "frozen_weights",
        "refresh_memory_gib",
        "refresh_interval",
        "lr",
        "betas",
        "eps",
        "weight_decay",
        "stall_timeout",
        "track_changes",
    }
)

#: Settings that a run may give up when it resumes, and not take up.
_GIVEN_UP = frozenset({"keep_base"})

_DEFAULTS = LiftConfig(density=1.0).to_dict()

Folder = str | os.PathLike[str]
Description = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """How many ranks share the states of a run, and in which ZeRO stage; 0 where none do."""

    ranks: int
    zero_stage: int

    def reads(self, description: Mapping[str, Any]) -> bool:
        """Tell whether a run of this layout can load a checkpoint: a universal one, or one of its own layout."""
        if description["universal"]:
            return self.zero_stage > 0
        stages = {self.zero_stage, description["zero_stage"]}
        same_kind = len(stages) == 1 or stages == {1, 2}  # ZeRO-1 and 2 partition the same states in the same way
        return same_kind and (self.zero_stage == 0 or self.ranks == description["ranks"])


@dataclass(frozen=True)
class Choice:
    """The newest whole checkpoint among some folders: its name, and the incomplete ones with what is wrong."""

    taken: str | None
    passed_over: dict[str, str]

    def __str__(self) -> str:
        over = "; ".join(f"{name}: {reason}" for name, reason in self.passed_over.items())
        return f"{self.taken or 'none'}" + (f" (passed over {over})" if over else "")


def commit(
    model: nn.Module, directory: Folder, *, step: int = 0, layout: Layout | None = None, latest: bool = True
) -> None:
    """Complete a checkpoint that every rank has finished writing, and write its description; all ranks call.

    Each rank adds the subspaces its solver starts from, and its record of what training has changed. A few all-gathers
    of file names and checksums; every file is read once, by one rank. Afterwards the checkpoint is whole for `newest`
    and `verify`, whatever happens to this process.

    Args:
        model: the model LIFT is attached to.
        directory: an existing folder; ranks of other machines may see other files in a folder of this name.
        step: optimizer steps of the run.
        layout: that of the run; leave it out without DeepSpeed.
        latest: False keeps it from being taken unless it is named.

    Raises:
        ValueError: on every rank, when a file cannot be read or the description cannot be written.
    """
    layout = layout or Layout(1, 0)
    require_attachment(model).require_trained()
    for write in (subspaces.write, changes.write):
        together(partial(write, model, directory))
    content = {
        "written": time.time(),
        "step": step,
        "universal": False,
        "ranks": layout.ranks,
        "zero_stage": layout.zero_stage,
        "latest": latest,
        **_belonging(model),
    }
    commit_as(content, directory)


def commit_as(description: Mapping[str, Any], directory: Folder) -> None:
    """Like `commit`, with everything but the list of files given."""
    from_all(None)  # nobody looks before everybody has written
    files = _hashed(directory, together(lambda: manifest.files_in(directory, DESCRIPTION)), keep=True)
    content = {"format": FORMAT, **description, "files": files}
    by_main(lambda: manifest.write_sealed(Path(directory) / DESCRIPTION, content))


def withdraw(directory: Folder) -> None:
    """Take the description out of a folder that is about to be written into; all ranks call, one all-gather."""

    def remove() -> None:
        path = Path(directory) / DESCRIPTION
        if path.exists():
            others = newest(_siblings(directory))
            logger.warning(
                "saving over the checkpoint %s; until this save is complete %s",
                os.fspath(directory),
                f"the last whole one is {others.taken}" if others.taken else "there is no whole one",
            )
            path.unlink()

    by_main(remove)


def read(directory: Folder) -> Description:
    """Read the description of a checkpoint, without looking at its files; for one rank.

    Raises:
        ValueError: there is none, or none that can be relied on.
    """
    path = os.path.join(directory, DESCRIPTION)
    if not os.path.isdir(directory):
        raise ValueError(f"checkpoint folder {os.fspath(directory)!r} does not exist")
    if not os.path.isfile(path):
        raise ValueError(f"{path} is missing: the folder is no LIFT checkpoint, or one that was not written to its end")
    return manifest.read_sealed(path, FORMAT)


def verify(model: nn.Module, directory: Folder, layout: Layout | None = None) -> Description:
    """Check that a checkpoint is what was saved, by a run of this model with these settings; all ranks call.

    A few small all-gathers; every file is read once, by one rank. Nothing is loaded.

    Args:
        model: the model LIFT is attached to.
        directory: the checkpoint folder.
        layout: of the run that is to load it; not compared where None.

    Returns:
        Its description.

    Raises:
        ValueError: on every rank, when the folder or its description is missing, a file is missing, changed or not
            part of it, or it belongs to another model, selection or layout. The message names the file.
    """
    description = by_main(lambda: read(directory))
    together(lambda: _compare(os.path.join(directory, DESCRIPTION), description, _belonging(model)))
    if layout is not None:
        _require_layout(directory, description, layout)
    verify_files(description, directory)
    return description


def verify_files(description: Description, directory: Folder) -> None:
    """Check the files of a checkpoint against its description; all ranks call.

    Raises:
        ValueError: on every rank; names the first file that is missing, changed, or not part of the checkpoint.
    """
    seen = together(lambda: manifest.files_in(directory, DESCRIPTION))
    sizes = {name: size for files in reversed(seen) for name, size in files.items()}
    fault = _fault_in_sizes(description["files"], sizes)
    if fault is not None:
        raise ValueError(f"{os.fspath(directory)}{os.sep}{fault}")
    listed = [{name: size for name, size in files.items() if name in description["files"]} for files in seen]
    for name, found in _hashed(directory, listed, keep=False).items():
        if found["sha256"] != description["files"][name]["sha256"]:
            raise ValueError(
                f"{Path(directory) / name}: its content is not what was saved (another checkpoint's file, or damaged): "
                f"checksum {found['sha256'][:12]}..., {description['files'][name]['sha256'][:12]}... expected"
            )


def fault_of(directory: Folder) -> str | None:
    """Tell why a folder is not a whole checkpoint, by its description and the sizes of its files; None if it is."""
    try:
        description = read(directory)
        return _fault_in_sizes(description["files"], manifest.files_in(directory, DESCRIPTION))
    except ValueError as error:
        return str(error).removeprefix(f"{os.fspath(directory)}{os.sep}")


def newest(folders: Iterable[Folder], layout: Layout | None = None) -> Choice:
    """Find the newest whole checkpoint among folders; for one rank, no file but the descriptions is read.

    Args:
        folders: that may be checkpoints.
        layout: of the run that is to resume. Of a checkpoint and its universal copy it takes the one it can load,
            the checkpoint itself where it can load both.

    Returns:
        The name of the folder that was committed last, and why others were not whole.
    """
    whole, faults = [], {}
    for folder in folders:
        fault = fault_of(folder)
        if fault is not None:
            faults[Path(folder).name] = fault
            continue
        description = read(folder)
        if description["latest"]:
            fits = layout is None or layout.reads(description)
            whole.append((description["written"], fits, not description["universal"], Path(folder).name))
    return Choice(max(whole)[-1] if whole else None, faults)


def last_whole(directory: Folder) -> str:
    """Name the newest whole checkpoint beside a folder, or say that there is none."""
    choice = newest(path for path in _siblings(directory))
    return str(Path(directory).parent / choice.taken) if choice.taken else "none"


def looks_saved(folder: Path) -> bool:
    """Tell whether DeepSpeed or LIFT has saved into a folder, to its end or not."""
    return (folder / DESCRIPTION).exists() or any(folder.glob("*_states.pt"))


def _siblings(directory: Folder) -> list[Path]:
    directory = Path(directory)
    folders = (path for path in directory.parent.glob("*") if path.is_dir() and path.name != directory.name)
    return sorted(path for path in folders if (path / DESCRIPTION).exists())


def _hashed(directory: Folder, seen: list[dict[str, int]], *, keep: bool) -> dict[str, dict[str, Any]]:
    """Size and checksum of each file, by one of the ranks that see it; one all-gather.

    Args:
        directory: the folder.
        seen: for each rank the files it sees, name -> bytes.
        keep: have them put on the disk first.
    """
    rank, ranks = rank_and_count()
    sizes = {name: size for files in reversed(seen) for name, size in files.items()}
    names = sorted(sizes)
    jobs = deal_out([sizes[name] for name in names], ranks)
    owners = {names[job]: owner for owner, numbers in enumerate(jobs) for job in numbers}
    for name in names:
        if name not in seen[owners[name]]:  # a disk that not all machines share
            owners[name] = next(other for other, files in enumerate(seen) if name in files)

    def entry(name: str) -> dict[str, Any]:
        path = Path(directory) / name
        if keep:
            settle(path)
        return {"bytes": path.stat().st_size, "sha256": manifest.checksum(path)}

    def mine() -> dict[str, dict[str, Any]]:
        own = [name for name in names if owners[name] == rank]
        with ThreadPoolExecutor(_READERS) as readers:  # mostly waiting for the disk; hashing releases the lock
            return dict(zip(own, readers.map(entry, own), strict=True))

    return dict(sorted({name: entry for part in together(mine) for name, entry in part.items()}.items()))


def _fault_in_sizes(expected: Mapping[str, Any], sizes: Mapping[str, int]) -> str | None:
    for name, entry in expected.items():
        if name not in sizes:
            return f"{name} is missing, it was saved with {entry['bytes']:,} bytes"
        if sizes[name] != entry["bytes"]:
            return f"{name} has {sizes[name]:,} bytes, it was saved with {entry['bytes']:,}"
    for name in sizes:
        if name not in expected and name.endswith(_STATES):
            return f"{name} was not saved with this checkpoint; move it elsewhere"
    return None


def _require_layout(directory: Folder, description: Description, layout: Layout) -> None:
    if layout.reads(description):
        return
    here = os.fspath(directory)
    if description["universal"]:
        raise ValueError(f"{here}: a universal checkpoint loads in ZeRO stage 1, 2 or 3, not without DeepSpeed or in 0")
    raise ValueError(
        f"{here}: saved on {description['ranks']} ranks in ZeRO stage {description['zero_stage']}, this run has "
        f"{layout.ranks} in stage {layout.zero_stage}; convert it first: "
        f"python -m lift_ds.universal {here} {here.rstrip(os.sep)}-universal"
    )


def _belonging(model: nn.Module) -> Description:
    attachment = require_attachment(model)
    matrices = {
        name: {
            "shape": list(logical_shape(weight.weight)),
            "entries": weight.entries(),
            **({"matrices": weight.matrices} if weight.matrices > 1 else {}),
        }
        for name, weight in attachment.weights.items()
    }
    return {"config": attachment.config.to_dict(), "matrices": matrices}


def _compare(path: str, saved: Description, current: Description) -> None:
    _compare_layers(path, saved["matrices"], current["matrices"])
    for key, value in current["config"].items():
        before = saved["config"].get(key, _DEFAULTS.get(key))  # a checkpoint may be older than a setting
        may_differ = key in _FREE_SETTINGS or (key in _GIVEN_UP and not value)
        if before != value and not may_differ:
            raise ValueError(f"{path}: saved with {key}={before!r}, this run has {key}={value!r}")


def _compare_layers(path: str, saved: Description, current: Description) -> None:
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
