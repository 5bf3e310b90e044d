"""Tiles: a matrix is worked through a few rows at a time, so that nothing as large as it is ever formed beside it."""

from __future__ import annotations

from collections.abc import Iterator

#: Entries of a tile where nothing asks for smaller ones: 64 MiB in float32.
TILE_ENTRIES = 2**24


def tiles(length: int, other: int, entries: int = TILE_ENTRIES) -> Iterator[slice]:
    """Cut one side of a matrix.

    Args:
        length: of the side that is cut.
        other: length of the other side.
        entries: of a tile, at most (but at least one row or column).

    Yields:
        Slices that cover range(length), in order.
    """
    step = max(1, entries // other)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
