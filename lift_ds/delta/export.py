"""From two models to a delta: which entries of which tensors differ, by their bits."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from lift_ds.delta.file import DeltaWriter
from lift_ds.delta.layout import Entry, Spool
from lift_ds.delta.model_files import ModelFiles
from lift_ds.delta.tensors import changed_entries, checksum
from lift_ds.runtime.files import whole_file


def export_delta(base: str, tuned: str, output: str | Path) -> Path:
    """Write what training changed in a model as a file.

    A tensor of each model and what changed in it are in memory at a time.

    Args:
        base: folder or Hub name of the model before training.
        tuned: of the model after it.
        output: the delta file; one of this name is replaced.

    Returns:
        The file.

    Raises:
        ValueError: a model cannot be read, a tensor has another shape or dtype than the base's, or the models have no
            tensor in common.
        OSError: the file cannot be written.
    """
    before, after = ModelFiles(base), ModelFiles(tuned)
    check_pair(before, after)
    output = Path(output)
    check_output(output, before, after)
    old, new = before.tensors, after.tensors
    with whole_file(output) as unfinished, Spool(unfinished.parent) as spool, progress(len(old), "comparing") as shown:
        writer = DeltaWriter(spool, base)
        for name, entry in old.items():
            _add(writer, name, entry, before, after)
            shown.update()
        for name in (name for name in new if name not in old):
            tensor = after.read(name)
            writer.add_whole(name, new[name], None, tensor.numel(), tensor)
        writer.write(unfinished)
    return output


def _add(writer: DeltaWriter, name: str, entry: Entry, before: ModelFiles, after: ModelFiles) -> None:
    base = before.read(name)
    identity = checksum([base])
    if name not in after.tensors:
        writer.add_removed(name, entry, identity)
        return
    tuned = after.read(name)
    changed, indices, values = changed_entries(base, tuned)
    if not changed:
        writer.add_same(name, entry, identity)
    elif indices:
        writer.add_sparse(name, entry, identity, changed, indices, values)
    else:
        writer.add_whole(name, entry, identity, changed, tuned)


def check_pair(before: ModelFiles, after: ModelFiles) -> None:
    """Refuse models whose tensors cannot be compared.

    Raises:
        ValueError: names the first tensor of another shape or dtype, or says that none is in both.
    """
    old, new = before.tensors, after.tensors
    if not old.keys() & new.keys():
        first, second = next(iter(old), "none"), next(iter(new), "none")
        raise ValueError(
            f"{before.name} and {after.name} have no tensor in common ({first} in one, {second} in the other); "
            "give the model that the training started from"
        )
    for name in (name for name in old if name in new):
        if old[name].shape != new[name].shape:
            raise ValueError(
                f"{name} has the shape {[*new[name].shape]} in {after.name} and {[*old[name].shape]} in {before.name}; "
                "a delta is of tensors of one shape, so give the base with this shape, such as one with its "
                "vocabulary resized already"
            )
        if old[name].dtype != new[name].dtype:
            raise ValueError(
                f"{name} is {new[name].dtype} in {after.name} and {old[name].dtype} in {before.name}; a delta changes "
                "no dtype, so convert one of the models first, and give the base in the dtype that was trained"
            )


def check_output(output: Path, *models: ModelFiles) -> None:
    """Refuse an output that cannot be written, or is a file of a model.

    Raises:
        ValueError: says why.
    """
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise ValueError(f"--output {output}: cannot be written; its folder must be there, and it must be no folder")
    for model in models:
        if output.resolve() in {shard.path.resolve() for shard in model.shards}:
            raise ValueError(f"--output {output} is a file of {model.name}; give another name")


def check_new_folder(output: Path) -> None:
    """Refuse a folder that is in use, or cannot be made.

    Raises:
        ValueError: says why.
    """
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise ValueError(f"--output {output} is there already; name a folder that is not there, or an empty one")
    if not output.absolute().parent.is_dir():
        raise ValueError(f"--output {output}: the folder it would be in is not there")


def progress(tensors: int, about: str) -> tqdm:
    """Return a progress bar, which is shown on a terminal alone."""
    return tqdm(total=tensors, desc=about, unit="tensor", leave=False, disable=None)
