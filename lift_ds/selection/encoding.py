"""How a principal index is stored: per-row counts and 16-bit columns, two bytes an entry.

    flat positions I [k], ascending           words: int32, two 16-bit numbers in each
    row 0: 3 7      row 1: -      row 2: 0    counts 2 0 1 | columns 3 7 0 | padding to an even number

A matrix wider than 65,535 stores its flat positions as they are. The words are int32 because that is what every
backend of torch.distributed moves; NCCL has no 16-bit integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Widest matrix whose columns, and whose entries in a row, are 16-bit numbers.
MAX_NARROW = 2**16 - 1


def word_count(rows: int, columns: int, k: int) -> int:
    """Return how many int32 words store k positions in a matrix of that shape."""
    return k if columns > MAX_NARROW else (rows + k + 1) // 2


def encode(index: Tensor, rows: int, columns: int) -> Tensor:
    """Store flat positions.

    Args:
        index: int [k], row-major positions in a [rows, columns] matrix, ascending.
        rows: m.
        columns: n.

    Returns:
        Words, int32 [word_count(rows, columns, k)], on the same device.
    """
    if columns > MAX_NARROW:
        return index.to(torch.int32)
    row = torch.div(index, columns, rounding_mode="floor")  # [k]
    halves = index.new_zeros(2 * word_count(rows, columns, index.numel()), dtype=torch.int16)
    # Above 32,767 the conversion wraps around, and reading it back as unsigned undoes that.
    halves[:rows] = torch.bincount(row, minlength=rows).to(torch.int16)
    halves[rows : rows + index.numel()] = (index - row * columns).to(torch.int16)
    return halves.view(torch.int32)


def decode(words: Tensor, rows: int, columns: int, k: int) -> Tensor:
    """Read flat positions back; the inverse of `encode`, without a synchronisation of the device.

    Args:
        words: int32 [word_count(rows, columns, k)].
        rows: m.
        columns: n.
        k: entries.

    Returns:
        int32 [k], ascending.
    """
    if columns > MAX_NARROW:
        return words
    numbers = words.view(torch.int16)[: rows + k].to(torch.int32) & 0xFFFF
    starts = torch.arange(0, rows * columns, columns, dtype=torch.int32, device=words.device)  # [m]
    return torch.repeat_interleave(starts, numbers[:rows], output_size=k) + numbers[rows:]
