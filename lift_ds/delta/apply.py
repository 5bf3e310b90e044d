"""From a base and deltas to the tuned model, checked against what each delta says of its base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from lift_ds.delta.export import check_new_folder, progress
from lift_ds.delta.file import REMOVED, SAME, Change, DeltaFile
from lift_ds.delta.layout import Entry, write_file
from lift_ds.delta.meeting import ON_CONFLICT, apply_entries
from lift_ds.delta.model_files import INDEX, ModelFiles
from lift_ds.delta.tensors import checksum
from lift_ds.runtime.files import whole_folder


def apply_deltas(base: str, files: Sequence[str | Path], output: str | Path, on_conflict: str = "error") -> Path:
    """Write the tuned model: the base with what deltas change in it.

    The files have the names of the base's, and its configuration and tokenizer go along. A tensor of the base, the one
    it becomes and what the deltas hold of it are in memory at a time.

    Args:
        base: folder or Hub name of the model that the deltas are of.
        files: the deltas.
        output: folder of the tuned model; it must not be there, or be empty.
        on_conflict: what to do where deltas give an entry different values: "error"; "last", the value of the delta
            that is named last; "mean", the mean in float32 of all deltas that change it, rounded to its dtype.

    Returns:
        The folder.

    Raises:
        ValueError: the base is another one, a delta is damaged, deltas are in conflict, or the output is in use; the
            message names the tensor. Nothing is written.
        OSError: the model cannot be written.
    """
    output = Path(output)
    check_new_folder(output)
    tuned = TunedModel(base, files, on_conflict)
    shards = tuned.shards()
    total = sum(map(len, shards.values()))
    with whole_folder(output) as unfinished, progress(total, "applying") as shown:

        def read(name: str) -> Tensor:
            shown.update()
            return tuned.read(name)

        for shard in (shard for shard in tuned.base.shards if shards[shard.path.name]):
            write_file(unfinished / shard.path.name, shards[shard.path.name], shard.texts, read)
        for path in tuned.base.beside():
            shutil.copyfile(path, unfinished / path.name)
        _write_index(unfinished, tuned.base.folder / INDEX, shards)
    return output


class TunedModel:
    """The tensors of a base with deltas applied, computed when they are read.

    Args:
        base: folder or Hub name.
        files: the deltas.
        on_conflict: one of ON_CONFLICT.

    Raises:
        ValueError: a delta is damaged, or has other tensors than the base.
    """

    def __init__(self, base: str, files: Sequence[str | Path], on_conflict: str = "error") -> None:
        if on_conflict not in ON_CONFLICT:
            raise ValueError(f"--on-conflict {on_conflict!r} is unknown; valid are {', '.join(ON_CONFLICT)}")
        if not files:
            raise ValueError("no delta is given; name at least one file")
        self.base = ModelFiles(base)
        self.deltas = [DeltaFile(file) for file in files]
        self._rule = on_conflict
        for delta in self.deltas:
            _check_fit(self.base, delta)
        for name in dict.fromkeys(name for delta in self.deltas for name in delta.changes):
            _check_alike(name, [pair for pair in self._said(name) if pair[1].kind != SAME], on_conflict)

    def shards(self) -> dict[str, dict[str, Entry]]:
        """Return what each file will hold, by the file's name. Tensors that the base lacks go into the last one."""
        removed = {name for delta in self.deltas for name, change in delta.changes.items() if change.kind == REMOVED}
        shards = {
            shard.path.name: {name: entry for name, entry in shard.tensors.items() if name not in removed}
            for shard in self.base.shards
        }
        last = self.base.shards[-1].path.name
        added = {
            name: delta.entry_of_whole(name)
            for delta in self.deltas
            for name, change in delta.changes.items()
            if change.base is None
        }
        if added:
            # Larger numbers first, as everywhere in safetensors, so that all are aligned.
            together = {**shards[last], **added}.items()
            shards[last] = dict(sorted(together, key=lambda item: -item[1].size // max(1, item[1].entries)))
        return shards

    def read(self, name: str) -> Tensor:
        """Return a tensor.

        Raises:
            ValueError: the base's is another one, a delta is damaged, or deltas are in conflict.
        """
        said = self._said(name)
        base = None
        if name in self.base.tensors:
            base = self.base.read(name)
            _check_base(self.base, name, checksum([base]), said)
        changing = [delta for delta, change in said if change.kind != SAME]
        if not changing:
            assert base is not None, "a delta changes whatever the base lacks"
            return base
        shape = said[0][1].shape
        result, conflicts = apply_entries(base, [delta.read(name) for delta in changing], self._rule, shape)
        if conflicts.entries and self._rule == "error":
            files = ", ".join(str(delta.path) for delta in changing)
            raise ValueError(
                f"the deltas meet in {name}: {files} give {conflicts.entries} of its {result.numel()} entries "
                f"different values, by up to {conflicts.largest:.3g}; --on-conflict last or mean settles that"
            )
        return result

    def _said(self, name: str) -> list[tuple[DeltaFile, Change]]:
        return [(delta, delta.changes[name]) for delta in self.deltas if name in delta.changes]

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Return all tensors, one after the other."""
        return ((name, self.read(name)) for shard in self.shards().values() for name in shard)


def _check_fit(base: ModelFiles, delta: DeltaFile) -> None:
    """Refuse a base whose tensors have other names, shapes or dtypes than the delta says."""
    of_base = {name: change for name, change in delta.changes.items() if change.base is not None}
    wrong = f"{delta.path} is no delta of {base.name}, but of {delta.base}"
    for name, change in of_base.items():
        if name not in base.tensors:
            raise ValueError(f"{wrong}: {base.name} has no tensor {name}")
        entry = base.tensors[name]
        if (entry.shape, entry.dtype) != (change.shape, change.dtype):
            raise ValueError(
                f"{wrong}: {name} is {entry.dtype} {[*entry.shape]}, and was {change.dtype} {[*change.shape]}"
            )
    more = [name for name in base.tensors if name not in of_base]
    if more:
        raise ValueError(f"{wrong}: {base.name} has a tensor {more[0]}, which that model lacks")


def _check_base(base: ModelFiles, name: str, found: str, said: Sequence[tuple[DeltaFile, Change]]) -> None:
    for delta, change in said:
        if change.base != found:
            raise ValueError(
                f"{delta.path} is no delta of {base.name}, but of {delta.base}: {name} has another checksum"
            )


def _check_alike(name: str, changing: Sequence[tuple[DeltaFile, Change]], rule: str) -> None:
    """Refuse deltas that cannot be settled entry by entry."""
    if len(changing) < 2:
        return
    (first, change), *others = changing
    for other, another in others:
        if (change.kind == REMOVED) != (another.kind == REMOVED):
            raise ValueError(f"{name} is removed by one of {first.path} and {other.path}, and changed by the other")
        if (change.shape, change.dtype) != (another.shape, another.dtype):
            raise ValueError(
                f"{name}, which the base lacks, has another shape or dtype in {other.path} than in {first.path}"
            )
    if rule == "mean" and change.kind != REMOVED and not change.dtype.startswith(("F", "BF")):
        raise ValueError(f"{name} is {change.dtype}, of which there is no mean; --on-conflict last takes one of them")


def _write_index(folder: Path, of_base: Path, shards: dict[str, dict[str, Entry]]) -> None:
    """Write the index of files, where the base has one."""
    if not of_base.is_file():
        return
    index = json.loads(of_base.read_text(encoding="utf-8"))
    held = dict(sorted((name, shard) for shard, tensors in shards.items() for name in tensors))
    if held.keys() != index["weight_map"].keys():
        entries = [entry for tensors in shards.values() for entry in tensors.values()]
        sums = {"total_size": sum(entry.size for entry in entries), "total_parameters": sum(e.entries for e in entries)}
        noted = index.get("metadata") or {}
        index["metadata"] = noted | {key: sums[key] for key in sums if key in noted}
    (folder / INDEX).write_text(json.dumps({**index, "weight_map": held}, indent=2) + "\n", encoding="utf-8")
