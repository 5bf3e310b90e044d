"""Entries: some positions of the part of a weight that a rank holds, and a number for each.

A position takes 2 bytes, as in the index of a weight: the rows that the part lies in are stored as a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lift_ds.index.access import access_to
from lift_ds.index.encoding import CompactIndex, IndexLayout, encode


@dataclass(frozen=True)
class Part:
    """The flat positions [start, stop) of a weight.

    Args:
        start: the first.
        stop: one past the last.
        columns: n of the weight.
        long: whether its flat positions need 64 bits.
    """

    start: int
    stop: int
    columns: int
    long: bool

    @property
    def origin(self) -> int:
        """Flat position at which the row begins that the part begins in."""
        return self.start - self.start % self.columns

    @property
    def rows(self) -> int:
        """How many rows of the weight the part lies in; one where it is empty, as that of a rank may be."""
        return max(1, -(-(self.stop - self.origin) // self.columns))

    def of(self, positions: Tensor) -> Tensor:
        """Return those of some ascending positions that lie in the part. One read of the device."""
        bounds = torch.tensor([self.start, self.stop], device=positions.device, dtype=positions.dtype)
        first, last = torch.searchsorted(positions, bounds).tolist()
        return positions[first:last]


@dataclass(frozen=True)
class Entries:
    """Some entries of a part of a weight, and a number for each.

    Args:
        part: of the weight.
        index: their positions, counted from the beginning of the part's first row.
        numbers: one for each, in their order, on the same device.
    """

    part: Part
    index: CompactIndex
    numbers: Tensor

    @classmethod
    def of(cls, part: Part, positions: Tensor, numbers: Tensor) -> Entries:
        """Store entries.

        Args:
            part: that they lie in.
            positions: flat, in the weight, ascending, each once.
            numbers: one for each.
        """
        layout = IndexLayout(part.rows, part.columns, positions.numel())
        words = encode(positions - part.origin, layout.rows, layout.columns)
        return cls(part, CompactIndex(words, layout), numbers)

    def positions(self) -> Tensor:
        """Return the flat positions in the weight, ascending, int32 or where it is long int64."""
        positions = self.index.positions()
        return (positions.long() if self.part.long else positions) + self.part.origin

    def with_more(self, positions: Tensor, numbers: Tensor) -> Entries:
        """Return these and others, which are not among them.

        Args:
            positions: flat, in the weight, ascending.
            numbers: one for each, of the same dtype.
        """
        merged, order = torch.cat([self.positions(), positions]).sort()
        return Entries.of(self.part, merged, torch.cat([self.numbers, numbers])[order])

    def without(self, positions: Tensor) -> Entries:
        """Return those whose positions are not among some others, which ascend."""
        own = self.positions()
        stay = ~contained(own, positions)
        return Entries.of(self.part, own[stay], self.numbers[stay])

    @torch.no_grad()
    def exchange(self, piece: Tensor) -> Entries:
        """Write the numbers over a part of a weight, in place; return the entries with what stood there.

        Args:
            piece: the part, 1-D and contiguous, in the dtype of the numbers.
        """
        access, start = access_to(self.index), self.part.start - self.part.origin
        before = torch.empty_like(self.numbers)
        access.gather(piece, start, before)
        access.put(piece, start, self.numbers)
        return replace(self, numbers=before)


def contained(positions: Tensor, among: Tensor) -> Tensor:
    """Return for each position whether it is among some others, which ascend; bool."""
    if not among.numel():
        return torch.zeros_like(positions, dtype=torch.bool)
    place = torch.searchsorted(among, positions).clamp_(max=among.numel() - 1)
    return among[place] == positions
