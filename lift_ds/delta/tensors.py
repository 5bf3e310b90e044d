"""Tensors as the bits they are made of: compared, counted and given a checksum without a conversion."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

#: Entries that are looked at together, so that what is computed on the way stays small beside a large tensor.
PIECE = 1 << 20

#: The largest number of entries whose positions fit in int32.
INT32_ENTRIES = 2**31 - 1

_WHOLE_NUMBERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_of(tensor: Tensor) -> Tensor:
    """Return a flat view of whole numbers, so that 0.0 differs from -0.0 and NaN equals itself."""
    return tensor.reshape(-1).view(_WHOLE_NUMBERS[tensor.element_size()])


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, without a copy where it is contiguous."""
    if not tensor.numel():
        return memoryview(b"")
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def checksum(tensors: Iterable[Tensor]) -> str:
    """Return the checksum of the bytes of tensors, one after the other.

    Args:
        tensors: as they lie in memory, little-endian, which is how safetensors keeps them.

    Returns:
        32 hexadecimal digits.
    """
    # BLAKE2b: no two contents are known that share one, so that the checksum says which tensor it is; a CRC would
    # only say that no bit fell over. It takes about a second for a gigabyte, no longer than many a disk to read it.
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def pieces_of(entries: int) -> Iterator[slice]:
    """Return where the pieces of a flat tensor begin and end."""
    return (slice(start, min(start + PIECE, entries)) for start in range(0, entries, PIECE))


def index_dtype(entries: int) -> torch.dtype:
    """Return the dtype of positions in a tensor of so many entries."""
    return torch.int32 if entries <= INT32_ENTRIES else torch.int64


def changed_entries(base: Tensor, tuned: Tensor) -> tuple[int, list[Tensor], list[Tensor]]:
    """Find the entries whose bits differ.

    Args:
        base: any shape and dtype.
        tuned: the same shape and dtype.

    Returns:
        How many there are; their flat positions, ascending, and their values in `tuned`, both in pieces. Both lists
        are empty where nothing changed, and where positions and values together would be larger than the tensor.
    """
    total, size = tuned.numel(), tuned.element_size()
    kind = index_dtype(total)
    most = total * size // (kind.itemsize + size)  # more than these are smaller as a whole
    before, after = bits_of(base), bits_of(tuned)
    changed = 0
    positions_found: list[Tensor] = []
    values_found: list[Tensor] = []
    for piece in pieces_of(total):
        positions = (before[piece] != after[piece]).nonzero().reshape(-1)
        changed += len(positions)
        if changed > most:
            positions_found.clear()
            values_found.clear()
        elif len(positions):
            values_found.append(after[piece][positions].view(tuned.dtype))
            positions_found.append((positions + piece.start).to(kind))
    return changed, positions_found, values_found
