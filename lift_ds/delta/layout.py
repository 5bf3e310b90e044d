"""The layout of a safetensors file, read and written a tensor at a time.

    8 bytes      length of the header, little-endian
    header       JSON: tensor -> dtype, shape, where its data begin and end; texts under "__metadata__"
    data         of one tensor after the other, without a gap

The writer of safetensors wants all tensors at once, which for a large model is more than fits in memory. Reading is
left to the library, which also checks that a header and the length of its file agree.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lift_ds.delta.tensors import bytes_of

METADATA = "__metadata__"

_LENGTH = 8  # bytes of the header's length
_LARGEST_HEADER = 100_000_000  # by the format


@dataclass(frozen=True)
class Entry:
    """A tensor in a file."""

    dtype: str  # as safetensors calls it, such as BF16
    shape: tuple[int, ...]
    size: int  # bytes

    @property
    def entries(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str], bytes]:
    """Read what a file holds.

    Args:
        path: of a safetensors file.

    Returns:
        Its tensors in the order of their data, its texts, and the header as it is written.

    Raises:
        ValueError: it is no safetensors file, or is not whole.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(_LENGTH), "little")
            raw = file.read(min(length, _LARGEST_HEADER))
        header = json.loads(raw)
        with safe_open(path, "pt"):  # which checks that all data are there
            pass
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    texts = header.pop(METADATA, {})
    ordered = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    tensors = {
        name: Entry(entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in ordered
    }
    return tensors, texts, raw


def read_tensor(path: Path, name: str) -> Tensor:
    """Read a tensor.

    The file is opened for it alone: safetensors maps a file into memory, and the pages of a tensor that was read
    count as this process's until the file is closed.
    """
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def header_of(tensors: Mapping[str, Entry], texts: Mapping[str, str]) -> bytes:
    """Return a header.

    Args:
        tensors: in the order of their data.
        texts: the metadata, which come first, in this order.
    """
    header: dict[str, object] = {METADATA: dict(texts)} if texts else {}
    start = 0
    for name, entry in tensors.items():
        header[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [start, start + entry.size],
        }
        start += entry.size
    raw = json.dumps(header, separators=(",", ":")).encode()
    return raw + b" " * (-len(raw) % _LENGTH)  # so that the data begin where any number may


def write_file(
    path: Path, tensors: Mapping[str, Entry], texts: Mapping[str, str], read: Callable[[str], Tensor]
) -> None:
    """Write a file of which it is known beforehand what it will hold.

    Args:
        path: where to.
        tensors: in the order of their data.
        texts: the metadata.
        read: gives the tensor of a name. One is held at a time.
    """
    with open(path, "wb") as file:
        _begin(file, header_of(tensors, texts))
        for name, entry in tensors.items():
            written = file.write(bytes_of(read(name)))  # under no name, which would keep it while the next is read
            assert written == entry.size, f"{name} has {written} bytes, not {entry.size}"


class Spool:
    """Collects the tensors of a file of which only the end tells what it holds.

    The header, with the place of each tensor, stands before the data. Data wait in files without a name beside the
    output, of which nothing is left whenever the process ends, and are copied behind the header. Counting in a first
    pass and writing in a second one would read and compare both models twice. There is a file for each size of a
    number, since safetensors wants the larger numbers first, so that all of them are aligned.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[int, IO[bytes]] = {}
        self._tensors: dict[int, dict[str, Entry]] = {}

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files.values():
            file.close()

    def add(self, name: str, dtype: str, shape: Iterable[int], pieces: Iterable[Tensor]) -> None:
        """Take a tensor.

        Args:
            name: in the file.
            dtype: as safetensors calls it.
            shape: of the whole.
            pieces: of its flat entries, in their order.
        """
        size = written = 0
        for piece in pieces:
            size = piece.element_size()
            if size not in self._files:
                self._files[size] = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
            written += self._files[size].write(bytes_of(piece))
        self._tensors.setdefault(size, {})[name] = Entry(dtype, tuple(shape), written)

    def tensors(self) -> dict[str, Entry]:
        """Return what was taken, in the order of the file."""
        return {
            name: entry for size in sorted(self._tensors, reverse=True) for name, entry in self._tensors[size].items()
        }

    def write(self, path: Path, header: bytes) -> None:
        """Write the file: this header, then the data that were taken."""
        with open(path, "wb") as output:
            _begin(output, header)
            for size in sorted(self._files, reverse=True):
                self._files[size].seek(0)
                shutil.copyfileobj(self._files[size], output, 1 << 22)


def _begin(file: IO[bytes], header: bytes) -> None:
    file.write(len(header).to_bytes(_LENGTH, "little"))
    file.write(header)
