"""How a principal index is stored: per-row counts and 16-bit columns, two bytes an entry.

    flat positions I [k], ascending           words: int32, two 16-bit numbers in each
    row 0: 3 7      row 1: -      row 2: 0    counts 2 0 1 | columns 3 7 0 | padding to an even number

A matrix wider than 65,535 stores its flat positions as they are. The words are int32 because that is what every
backend of torch.distributed moves; NCCL has no 16-bit integers.

An index made of whole blocks of shape (p, q) stores its blocks: row counts and columns in the grid [m/p, n/q] of
blocks, p * q times fewer numbers. I stays the positions of its entries, in ascending order:

    I of one row of blocks, p = 2, q = 2      entry 0 1 | 2 3        row i of the p: the c blocks of this row of
    with the blocks at columns 0 and 2        entry 4 5 | 6 7        blocks, q entries each, one after the other

A stack of E matrices [m, n] is stored as the one matrix [E * m, n] that it is in memory. The first k entries of its
index lie in the first m rows, the next k in the next m rows, and so on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Widest grid whose columns, and whose blocks in a row, are 16-bit numbers.
MAX_NARROW = 2**16 - 1
#: Most entries whose flat positions are 32-bit numbers.
MAX_POSITIONS = 2**31 - 1


@dataclass(frozen=True)
class IndexLayout:
    """What the words of one matrix's index mean.

    Args:
        rows: m, a multiple of p; of a stack those of all its matrices.
        columns: n, a multiple of q.
        entries: k, a multiple of p * q; of a stack those of all its matrices.
        block_shape: (p, q).
        matrices: E, of a stack; rows and entries are the same in each of them.
    """

    rows: int
    columns: int
    entries: int
    block_shape: tuple[int, int] = (1, 1)
    matrices: int = 1

    def __post_init__(self) -> None:
        p, q = self.block_shape
        assert self.rows % (p * self.matrices) == 0, f"blocks of {p} rows do not fill {self.rows} / {self.matrices}"
        assert self.columns % q == 0, f"blocks of {q} columns do not fill {self.columns}"
        assert self.entries % (p * q * self.matrices) == 0, f"{self.entries} entries are no whole {p} x {q} blocks"

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the grid of blocks."""
        return self.rows // self.block_shape[0], self.columns // self.block_shape[1]

    @property
    def blocks(self) -> int:
        """How many blocks the index has."""
        return self.entries // (self.block_shape[0] * self.block_shape[1])

    @property
    def wide(self) -> bool:
        """Whether the words are the flat positions of the blocks in the grid."""
        return self.grid[1] > MAX_NARROW

    @property
    def long(self) -> bool:
        """Whether flat positions need 64 bits."""
        return self.rows * self.columns > MAX_POSITIONS

    @property
    def of_one(self) -> IndexLayout:
        """That of one matrix of the stack."""
        return IndexLayout(self.rows // self.matrices, self.columns, self.entries // self.matrices, self.block_shape)

    def word_count(self) -> int:
        """Return how many int32 words store the index."""
        return self.blocks if self.wide else (self.grid[0] + self.blocks + 1) // 2


@dataclass(frozen=True)
class CompactIndex:
    """The index of one matrix as it is stored.

    Args:
        words: int32 [layout.word_count()], whole.
        layout: what they mean.
    """

    words: Tensor
    layout: IndexLayout

    def positions(self) -> Tensor:
        """Return I [k], ascending, int32 or where the layout is long int64; no synchronisation of the device."""
        layout = self.layout
        if layout.wide and layout.block_shape == (1, 1):
            return self.words
        counts = self.block_starts().diff() if layout.wide else self._numbers(0, layout.grid[0])
        columns = self._block_columns(0, layout.blocks)
        return _expand(counts.long(), columns.long(), layout) if layout.long else _expand(counts, columns, layout)

    def positions_in_rows(self, rows: slice, blocks: slice) -> Tensor:
        """Return the positions in some rows of blocks, counted from the first entry of these rows.

        Args:
            rows: of the grid.
            blocks: those that stand in these rows, as `block_starts` says.

        Returns:
            int32 [entries there], ascending; no synchronisation of the device.
        """
        layout, starts = self.layout, self.block_starts() if self.layout.wide else None
        counts = self._numbers(rows.start, rows.stop) if starts is None else starts[rows.start : rows.stop + 1].diff()
        return _expand(counts, self._block_columns(blocks.start, blocks.stop), layout)

    def block_starts(self) -> Tensor:
        """Return int32 [m/p + 1]: how many blocks stand before each row of blocks; no synchronisation."""
        grid_rows, grid_columns = self.layout.grid
        if self.layout.wide:
            return _starts_of_rows(self.words, grid_rows, grid_columns)
        starts = self.words.new_zeros(grid_rows + 1)
        torch.cumsum(self._numbers(0, grid_rows), 0, dtype=torch.int32, out=starts[1:])
        return starts

    def of_matrix(self, number: int) -> CompactIndex:
        """Return the index of one matrix of a stack, a copy; its positions count from the first entry of the matrix."""
        one, whole = self.layout.of_one, self.layout
        if whole.matrices == 1:
            return self
        blocks = slice(one.blocks * number, one.blocks * (number + 1))
        if whole.wide:
            return CompactIndex(self.words[blocks] - number * one.grid[0] * one.grid[1], one)
        halves = self.words.view(torch.int16)
        counts, columns = halves[: whole.grid[0]], halves[whole.grid[0] :]
        words = self.words.new_zeros(one.word_count())
        own = words.view(torch.int16)
        own[: one.grid[0]] = counts[one.grid[0] * number : one.grid[0] * (number + 1)]
        own[one.grid[0] : one.grid[0] + one.blocks] = columns[blocks]
        return CompactIndex(words, one)

    def to(self, device: torch.device) -> CompactIndex:
        """Return it on another device."""
        return CompactIndex(self.words.to(device), self.layout)

    def _block_columns(self, start: int, stop: int) -> Tensor:
        """Return the columns in the grid of some blocks, int32 [stop - start]."""
        if self.layout.wide:
            return self.words[start:stop] % self.layout.grid[1]
        return self._numbers(self.layout.grid[0] + start, self.layout.grid[0] + stop)

    def _numbers(self, start: int, stop: int) -> Tensor:
        """Return some of the 16-bit numbers in the words, int32 [stop - start]."""
        return self.words.view(torch.uint16)[start:stop].to(torch.int32)


def word_count(rows: int, columns: int, k: int, block_shape: tuple[int, int] = (1, 1)) -> int:
    """Return how many int32 words store k positions, whole blocks, in a matrix of that shape."""
    return IndexLayout(rows, columns, k, block_shape).word_count()


def encode(index: Tensor, rows: int, columns: int, block_shape: tuple[int, int] = (1, 1)) -> Tensor:
    """Store flat positions.

    Args:
        index: int [k], row-major positions in a [rows, columns] matrix, ascending; a union of whole blocks.
        rows: m.
        columns: n.
        block_shape: (p, q), which divide m and n.

    Returns:
        Words, int32 [word_count(rows, columns, k, block_shape)], on the same device; no synchronisation of it.
    """
    layout = IndexLayout(rows, columns, index.numel(), block_shape)
    blocks = index if block_shape == (1, 1) else _blocks_of(index, layout)
    if layout.wide:
        return blocks.to(torch.int32)
    grid_rows, grid_columns = layout.grid
    row = torch.div(blocks, grid_columns, rounding_mode="floor")  # [blocks]
    halves = blocks.new_zeros(2 * layout.word_count(), dtype=torch.int16)
    # Above 32,767 the conversion wraps around, and reading it back as unsigned undoes that.
    halves[:grid_rows] = _starts_of_rows(blocks, grid_rows, grid_columns).diff().to(torch.int16)
    halves[grid_rows : grid_rows + blocks.numel()] = (blocks - row * grid_columns).to(torch.int16)
    return halves.view(torch.int32)


def stacked(words: Sequence[Tensor], layout: IndexLayout) -> Tensor:
    """Return the words of a stack.

    Args:
        words: of each of its matrices, as `encode` gives them.
        layout: of the stack.

    Returns:
        int32 [layout.word_count()]; where there is one matrix, its own words.
    """
    one = layout.of_one
    assert len(words) == layout.matrices, f"{len(words)} of {layout.matrices} matrices"
    if layout.matrices == 1:
        return words[0]
    if layout.wide:
        return torch.cat([own + number * one.grid[0] * one.grid[1] for number, own in enumerate(words)])
    halves = [own.view(torch.int16) for own in words]
    whole = words[0].new_zeros(layout.word_count())
    parts = [own[: one.grid[0]] for own in halves]
    parts += [own[one.grid[0] : one.grid[0] + one.blocks] for own in halves]
    torch.cat(parts, out=whole.view(torch.int16)[: layout.grid[0] + layout.blocks])
    return whole


def _blocks_of(index: Tensor, layout: IndexLayout) -> Tensor:
    """Return the positions of the blocks in the grid, [blocks], ascending, for those of their entries."""
    p, q = layout.block_shape
    first = index.view(-1, q)[:, 0]  # of each row of each block
    row = torch.div(first, layout.columns, rounding_mode="floor")
    top = torch.nonzero_static(row % p == 0, size=layout.blocks).squeeze(1)
    first, row = first[top], row[top]
    column = first - row * layout.columns
    return torch.div(row, p, rounding_mode="floor") * layout.grid[1] + torch.div(column, q, rounding_mode="floor")


def _starts_of_rows(blocks: Tensor, grid_rows: int, grid_columns: int) -> Tensor:
    """Return int32 [grid_rows + 1]: how many of some blocks, ascending in the grid, stand before each row of it."""
    firsts = torch.arange(grid_rows + 1, dtype=torch.int64, device=blocks.device) * grid_columns
    return torch.searchsorted(blocks, firsts.to(blocks.dtype), out_int32=True)


def _expand(counts: Tensor, columns: Tensor, layout: IndexLayout) -> Tensor:
    """Turn rows of blocks into positions, counted from the first entry of these rows.

    Args:
        counts: [rows of blocks], blocks in each, int32, or int64 for positions that need it.
        columns: [blocks], of each block in the grid, of the same dtype.
        layout: of the index.

    Returns:
        [blocks * p * q], ascending, of the same dtype.
    """
    (p, q), blocks = layout.block_shape, columns.numel()
    if p > 1:
        return _expand_tall(counts, columns, layout)
    # Repeating the row numbers and multiplying is several times faster than repeating the positions of the rows.
    row = torch.repeat_interleave(counts, output_size=blocks)
    first = torch.add(columns if q == 1 else columns * q, row, alpha=layout.columns)
    return first if q == 1 else _rows_of_blocks(first, q)


def _expand_tall(counts: Tensor, columns: Tensor, layout: IndexLayout) -> Tensor:
    """As `_expand`, for blocks of several rows: a segment of q entries for each row of each block, rows ascending."""
    (p, q), rows = layout.block_shape, counts.numel() * layout.block_shape[0]
    segments = counts.repeat_interleave(p, output_size=rows)  # in each row of the matrix
    row = torch.repeat_interleave(segments, output_size=columns.numel() * p)
    # The p rows of a row of blocks all read the columns of its blocks: how far back from the segment they stand.
    starts = counts.cumsum(0, dtype=counts.dtype) - counts
    back = segments.cumsum(0, dtype=counts.dtype) - segments - starts.repeat_interleave(p, output_size=rows)
    block = torch.arange(row.numel(), dtype=columns.dtype, device=row.device) - back[row]
    return _rows_of_blocks(torch.add(columns[block] * q, row, alpha=layout.columns), q)


def _rows_of_blocks(first: Tensor, q: int) -> Tensor:
    """Return q positions from each first one on."""
    return (first[:, None] + torch.arange(q, dtype=first.dtype, device=first.device)).view(-1)
