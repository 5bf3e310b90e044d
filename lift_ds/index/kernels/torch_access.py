"""Principal entries by torch's operators, from decoded positions."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from lift_ds.index.encoding import CompactIndex

#: Entries that are decoded at a time on a CPU, so that positions take a few MiB and not four bytes an entry. Smaller
#: parts were no faster, and much slower where threads wait for each other: each operator starts them anew.
_CHUNK = 2**20


class TorchAccess:
    """Access to the principal entries of one matrix, on any device; see `lift_ds.index.access.Access`.

    Args:
        index: whole.
    """

    def __init__(self, index: CompactIndex) -> None:
        self._index = index
        self._size = index.layout.rows * index.layout.columns
        self._on_host = index.words.device.type == "cpu"

    @cached_property
    def _starts(self) -> list[int]:
        """Blocks before each row of blocks; on the host alone."""
        return self._index.block_starts().tolist()

    @torch.no_grad()
    def gather(self, piece: Tensor, start: int, out: Tensor) -> None:
        """See `lift_ds.index.access.Access.gather`; no synchronisation of a device."""
        if self._is_part_on_device(piece):
            self._gather_where_inside(piece, start, out)
            return
        for own, offset, positions in self._parts(start, piece.numel()):
            # On one thread of a CPU a third faster than gather and take, which also need int64.
            if piece.dtype == out.dtype:
                torch.index_select(piece[offset:], 0, positions, out=out[own])
            else:
                out[own].copy_(piece[offset:].index_select(0, positions))

    @torch.no_grad()
    def put(self, piece: Tensor, start: int, values: Tensor) -> None:
        """See `lift_ds.index.access.Access.put`; no synchronisation of a device."""
        if self._is_part_on_device(piece):
            self._put_where_inside(piece, start, values)
            return
        for own, offset, positions in self._parts(start, piece.numel()):
            # The fastest on a CPU, though it needs int64: index_put_ takes half as long again, scatter_ into bf16 20
            # times as long; put_ refuses deterministic mode.
            piece[offset:].index_copy_(0, positions.long(), values[own].to(piece.dtype))

    def _is_part_on_device(self, piece: Tensor) -> bool:
        """Tell whether the host would have to ask a device which entries are inside a piece."""
        return not self._on_host and piece.numel() < self._size

    def _parts(self, start: int, length: int) -> Iterator[tuple[slice, int, Tensor]]:
        """Yield the entries in a range of flat positions, by parts: which, and int32 positions from an offset in it.

        On a device the range is all of W.
        """
        if self._on_host and (length < self._size or self._index.layout.entries > _CHUNK):
            yield from self._parts_on_host(start, length)
            return
        positions = self._index.positions()
        yield self._cut(slice(0, positions.numel()), positions, 0, start, length)

    def _parts_on_host(self, start: int, length: int) -> Iterator[tuple[slice, int, Tensor]]:
        p, q = self._index.layout.block_shape
        row_entries = p * self._index.layout.columns  # of a row of blocks
        first, last = start // row_entries, -(-(start + length) // row_entries)
        while first < last:
            fits = bisect_right(self._starts, self._starts[first] + _CHUNK // (p * q)) - 1
            stop = min(max(fits, first + 1), last)
            blocks = slice(self._starts[first], self._starts[stop])
            if blocks.start < blocks.stop:
                positions = self._index.positions_in_rows(slice(first, stop), blocks)
                own = slice(blocks.start * p * q, blocks.stop * p * q)
                if start <= first * row_entries and stop * row_entries <= start + length:
                    yield own, first * row_entries - start, positions
                else:
                    yield self._cut(own, positions, first * row_entries, start, length)
            first = stop

    def _cut(self, own: slice, positions: Tensor, origin: int, start: int, length: int) -> tuple[slice, int, Tensor]:
        """Keep of some entries those in a range of flat positions; a part of W on the host alone.

        Args:
            own: the entries.
            positions: theirs, int32, ascending, counted from `origin`.
            origin: flat position.
            start: of the range.
            length: of the range.
        """
        if length == self._size:
            return own, 0, positions
        stop = min(start + length - origin, 2**31 - 1)  # no position is as large as that
        bounds = torch.tensor([start - origin, stop], dtype=torch.int32, device=positions.device)
        first, last = torch.searchsorted(positions, bounds).tolist()
        return slice(own.start + first, own.start + last), 0, positions[first:last] + (origin - start)

    def _gather_where_inside(self, piece: Tensor, start: int, out: Tensor) -> None:
        """Gather without knowing on the host which entries are inside: all k are read, and those taken."""
        if not piece.numel():
            return
        local, inside = self._places(piece, start)
        picked = piece.index_select(0, local.clamp_(0, piece.numel() - 1)).to(out.dtype)
        torch.where(inside, picked, out, out=out)

    def _put_where_inside(self, piece: Tensor, start: int, values: Tensor) -> None:
        """Put without knowing on the host which entries are inside: all k are written, the others behind a copy."""
        local, inside = self._places(piece, start)
        longer = torch.cat([piece, piece.new_zeros(1)])
        target = torch.where(inside, local, piece.numel())
        longer.index_copy_(0, target.long(), values.to(piece.dtype))
        piece.copy_(longer[:-1])

    def _places(self, piece: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Return where all entries would stand in a piece, int32 [k], and whether they do."""
        local = self._index.positions() - start
        return local, (local >= 0) & (local < piece.numel())
