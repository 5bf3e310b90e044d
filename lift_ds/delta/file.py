"""The delta file: what it says of each tensor, and how a damaged one is noticed.

It is a safetensors file. A tensor of which some entries changed has two in it, `NAME.indices` (flat positions,
ascending) and `NAME.values` (what stands there now). One that takes less room as a whole, or that the base lacks, has
`NAME.whole`. The texts of its header say the rest:

    checksum   of the header itself, computed with zeros in this place
    format     "lift_delta"
    version    "1"
    base       folder or name of the base, as it was given
    tensors    JSON: tensor -> shape, dtype, kind, changed entries, checksums of the base's bytes and of those in here
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from lift_ds.delta.layout import METADATA, Entry, Spool, header_of, read_header, read_tensor
from lift_ds.delta.tensors import checksum

FORMAT = "lift_delta"
VERSION = "1"

INDICES, VALUES, WHOLE = ".indices", ".values", ".whole"

#: What became of a tensor: nothing, some entries, all of it as far as the file tells, or it is no more.
SAME, SPARSE, DENSE, REMOVED = "same", "sparse", "whole", "removed"
_PARTS = {SPARSE: (INDICES, VALUES), DENSE: (WHOLE,), SAME: (), REMOVED: ()}

_NO_CHECKSUM = "0" * 32
#: How the header begins, up to its checksum.
_OPENING = f'{{"{METADATA}":{{"checksum":"'.encode()


@dataclass(frozen=True)
class Change:
    """What a delta says of one tensor."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors calls it
    kind: str  # SAME, SPARSE, DENSE or REMOVED
    changed: int  # entries
    base: str | None  # checksum of the base's bytes; None where the base has no such tensor
    stored: str | None  # checksum of what the file holds of it; None where that is nothing


class DeltaFile:
    """A delta that is there to be applied. Its header is checked at once, the rest when it is read.

    Args:
        path: of the file.

    Raises:
        ValueError: it is no delta, was written by a later version, or is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{path}: there is no such file")
        self.entries, texts, header = read_header(self.path)
        if texts.get("format") != FORMAT:
            raise ValueError(f"{path} is a safetensors file, and no delta; `lift-ds export` writes deltas")
        if not _is_sealed(header, texts.get("checksum", "")):
            raise ValueError(f"{path} is damaged: its header does not have the checksum that it names")
        if texts["version"] != VERSION:
            raise ValueError(f"{path} is a delta of version {texts['version']}; this lift_ds reads version {VERSION}")
        self.base = texts["base"]
        self.changes = {
            name: Change(**{**change, "shape": tuple(change["shape"])})
            for name, change in json.loads(texts["tensors"]).items()
        }

    def read(self, name: str) -> tuple[Tensor | None, Tensor]:
        """Read what changed in a tensor.

        Args:
            name: of a tensor whose kind is SPARSE or DENSE.

        Returns:
            Flat positions, ascending, None for all of them; and the values there, flat.

        Raises:
            ValueError: the file is damaged.
        """
        change = self.changes[name]
        parts = [read_tensor(self.path, name + part) for part in _PARTS[change.kind]]
        if checksum(parts) != change.stored:
            raise ValueError(f"{self.path} is damaged: what it holds of {name} does not have its checksum")
        *indices, values = parts
        return (indices[0] if indices else None), values.reshape(-1)

    def entry_of_whole(self, name: str) -> Entry:
        """Return what the file holds of a tensor whose kind is DENSE."""
        return self.entries[name + WHOLE]

    def stored(self) -> Iterator[str]:
        """Return the names of the tensors of which the file holds something."""
        return (name for name, change in self.changes.items() if _PARTS[change.kind])


def is_delta(path: str | Path) -> bool:
    """Tell whether a file is a delta, whole or damaged."""
    with open(path, "rb") as file:
        return file.read(8 + len(_OPENING))[8:] == _OPENING


class DeltaWriter:
    """Writes a delta, a tensor at a time.

    Args:
        spool: collects the data.
        base: folder or name of the base.
    """

    def __init__(self, spool: Spool, base: str) -> None:
        self._spool, self._base = spool, base
        self.changes: dict[str, Change] = {}

    def add_same(self, name: str, entry: Entry, base: str) -> None:
        """Note a tensor that did not change, by the checksum of its bytes."""
        self.changes[name] = Change(entry.shape, entry.dtype, SAME, 0, base, None)

    def add_removed(self, name: str, entry: Entry, base: str) -> None:
        """Note a tensor that the tuned model lacks."""
        self.changes[name] = Change(entry.shape, entry.dtype, REMOVED, 0, base, None)

    def add_sparse(
        self, name: str, entry: Entry, base: str, changed: int, indices: list[Tensor], values: list[Tensor]
    ) -> None:
        """Take a tensor of which some entries changed; positions and values in pieces."""
        kind = "I32" if indices[0].dtype == torch.int32 else "I64"
        self._spool.add(name + INDICES, kind, [changed], indices)
        self._spool.add(name + VALUES, entry.dtype, [changed], values)
        stored = checksum([*indices, *values])
        self.changes[name] = Change(entry.shape, entry.dtype, SPARSE, changed, base, stored)

    def add_whole(self, name: str, entry: Entry, base: str | None, changed: int, tensor: Tensor) -> None:
        """Take a tensor with all its entries; `base` is None where the base has none of its name."""
        self._spool.add(name + WHOLE, entry.dtype, entry.shape, [tensor])
        self.changes[name] = Change(entry.shape, entry.dtype, DENSE, changed, base, checksum([tensor]))

    def write(self, path: Path) -> None:
        """Write the file, and its header's checksum into the header."""
        changes = {name: asdict(change) for name, change in self.changes.items()}
        texts = {"checksum": _NO_CHECKSUM, "format": FORMAT, "version": VERSION, "base": self._base}
        texts["tensors"] = json.dumps(changes, separators=(",", ":"))
        self._spool.write(path, _sealed(header_of(self._spool.tensors(), texts)))


def _sealed(header: bytes) -> bytes:
    """Return a header with its checksum in it, which has zeros there yet."""
    assert header.startswith(_OPENING + _NO_CHECKSUM.encode())
    end = len(_OPENING) + len(_NO_CHECKSUM)
    return _OPENING + _checksum_of(header).encode() + header[end:]


def _is_sealed(header: bytes, named: str) -> bool:
    end = len(_OPENING) + len(_NO_CHECKSUM)
    return header.startswith(_OPENING) and _checksum_of(_OPENING + _NO_CHECKSUM.encode() + header[end:]) == named


def _checksum_of(header: bytes) -> str:
    return checksum([torch.frombuffer(bytearray(header), dtype=torch.uint8)])
