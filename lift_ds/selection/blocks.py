"""Selecting blocks of entries instead of single ones: [m, n] is a grid [m / p, n / q] of blocks of shape (p, q)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: (p, q); (1, 1) for single entries.
BlockShape = tuple[int, int]


def divides(block_shape: BlockShape, shape: Sequence[int]) -> bool:
    """Tell whether a matrix consists of whole blocks."""
    return shape[0] % block_shape[0] == 0 and shape[1] % block_shape[1] == 0


def block_sums(scores: Tensor, block_shape: BlockShape) -> Tensor:
    """Sum the scores of entries [rows, columns] over blocks; [rows / p, columns / q]."""
    height, width = block_shape
    if height == width == 1:
        return scores
    rows, columns = scores.shape
    return scores.view(rows // height, height, columns // width, width).sum((1, 3))


def entries_of_blocks(blocks: Tensor, columns: int, block_shape: BlockShape) -> Tensor:
    """Return the flat positions of the entries of blocks.

    Args:
        blocks: int64 [b], row-major numbers in the grid of blocks, ascending.
        columns: n of the matrix.
        block_shape: (p, q).

    Returns:
        int64 [b p q], row-major positions in the matrix, ascending.
    """
    height, width = block_shape
    if height == width == 1:
        return blocks
    row, column = blocks // (columns // width), blocks % (columns // width)
    corner = row * height * columns + column * width  # [b]
    down = torch.arange(height, device=blocks.device)[:, None] * columns
    within = (down + torch.arange(width, device=blocks.device)).flatten()  # [p q]
    return (corner[:, None] + within).flatten().sort().values
