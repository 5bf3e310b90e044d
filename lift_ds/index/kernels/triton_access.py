"""Principal entries by a Triton kernel that reads the stored index: row counts, 16-bit columns, blocks.

One program copies the entries of one row of the matrix. Where they begin among all k it reads from the counts of blocks
before each row of blocks, which are summed up on the device; so nothing of the size of k is made beside θ and its
gradient, and the host waits for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lift_ds.index.dtensors import refuse_dtensors
from lift_ds.index.encoding import CompactIndex

#: Entries a program copies at a time; 5% of a row of 4,096 are 205.
_CHUNK = 256


# Compiled once for each pair of dtypes, block shape, form of the index and direction: an entry stands anywhere in its
# row, so that knowing how sizes and addresses are aligned would save nothing.
@triton.jit(
    do_not_specialize=["first_row", "start", "stop", "row_length", "grid_columns"],
    do_not_specialize_on_alignment=["piece", "values", "columns", "starts"],
)
def copy_entries(  # type: ignore[no-untyped-def]  # Triton reads annotations, and knows none of Python's types
    piece,
    values,
    columns,
    starts,
    first_row,
    start,
    stop,
    row_length,
    grid_columns,
    P: tl.constexpr,
    Q: tl.constexpr,
    WIDE: tl.constexpr,
    LONG: tl.constexpr,
    GATHER: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Copy the entries of one row of the matrix between `piece` and `values`.

    Args:
        piece: flat positions [start, stop) of the matrix.
        values: [k].
        columns: of the blocks, 16 bits each, unsigned; WIDE: int32 positions of the blocks in the grid.
        starts: int32 [m/P + 1], blocks before each row of blocks.
        first_row: row of the first program.
        start: of the piece.
        stop: of the piece.
        row_length: n.
        grid_columns: n / Q.
        P: rows of a block.
        Q: columns of a block.
        WIDE: which form the index has.
        LONG: whether flat positions need 64 bits.
        GATHER: from piece to values; else from values to piece.
        CHUNK: entries at a time.
    """
    row = first_row + tl.program_id(0)
    grid_row = row // P
    before = tl.load(starts + grid_row)
    count = (tl.load(starts + grid_row + 1) - before) * Q
    first = before * (P * Q) + (row % P) * count
    for done in range(0, count, CHUNK):
        entry = done + tl.arange(0, CHUNK)
        exists = entry < count
        number = tl.load(columns + before + entry // Q, mask=exists, other=0).to(tl.int32)
        column = number - grid_row * grid_columns if WIDE else number & 0xFFFF
        position = (row.to(tl.int64) if LONG else row) * row_length + column * Q + entry % Q
        inside = exists & (position >= start) & (position < stop)
        if GATHER:
            value = tl.load(piece + (position - start), mask=inside)
            tl.store(values + first + entry, value.to(values.dtype.element_ty), mask=inside)
        else:
            value = tl.load(values + first + entry, mask=inside)
            tl.store(piece + (position - start), value.to(piece.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Launch:
    """One call of `copy_entries`.

    Args:
        programs: how many run; a row of the matrix each.
        arguments: by position.
        constants: by name; the kernel is compiled for each of their values.
    """

    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


class TritonAccess:
    """Access to the principal entries of one matrix on a CUDA device; see `lift_ds.index.access.Access`.

    Args:
        index: whole.
    """

    def __init__(self, index: CompactIndex) -> None:
        self._layout = index.layout
        self._starts = index.block_starts()
        words = index.words
        self._columns = words if index.layout.wide else words.view(torch.int16)[index.layout.grid[0] :]

    @torch.no_grad()
    def gather(self, piece: Tensor, start: int, out: Tensor) -> None:
        """See `lift_ds.index.access.Access.gather`."""
        self._copy(piece, start, out, gather=True)

    @torch.no_grad()
    def put(self, piece: Tensor, start: int, values: Tensor) -> None:
        """See `lift_ds.index.access.Access.put`."""
        self._copy(piece, start, values, gather=False)

    def launch(self, piece: Tensor, start: int, values: Tensor, *, gather: bool) -> Launch:
        """Return how the kernel is called for a piece; nothing is read from the device.

        Args:
            piece: as in `gather`.
            start: as in `gather`.
            values: [k].
            gather: from piece to values; else from values to piece.
        """
        refuse_dtensors(self._columns, piece, values)
        assert piece.is_contiguous(), "a piece is a range of flat positions"
        assert values.is_contiguous(), "the values stand in the order of the index"
        n, (p, q), stop = self._layout.columns, self._layout.block_shape, start + piece.numel()
        rows = range(start // n, -(-stop // n))
        return Launch(
            programs=len(rows),
            arguments=(
                piece, values, self._columns, self._starts, rows.start, start, stop, n, self._layout.grid[1],
            ),
            constants={
                "P": p, "Q": q, "WIDE": self._layout.wide, "LONG": self._layout.long, "GATHER": gather, "CHUNK": _CHUNK,
            },
        )  # fmt: skip

    def _copy(self, piece: Tensor, start: int, values: Tensor, *, gather: bool) -> None:
        launch = self.launch(piece, start, values, gather=gather)
        if launch.programs:
            with torch.cuda.device_of(piece):  # triton launches on the current device
                copy_entries[(launch.programs,)](*launch.arguments, **launch.constants)
