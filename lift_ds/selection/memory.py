"""What a refresh takes in memory beside what training holds, and how small its tiles must be to stay within a bound.

Upper estimates, in bytes; `tests/unit/test_refresh_memory.py` holds them against the allocator.
"""

from __future__ import annotations

from lift_ds.selection.tiles import TILE_ENTRIES

#: Blocks of 3/2 r vectors that "chebyshev" holds at most beside its Gram matrix, and the columns of W' it samples.
_BLOCKS, _SAMPLE = 12, 5 * 128
#: Numbers a symmetric eigensolver holds per entry of its matrix: the matrix, the vectors, twice that as workspace.
_EIGH = 4
#: Bytes a candidate of the ranking takes: score, position, both once more where pieces are joined, and a mask.
_CANDIDATE = 17
#: Bytes per selected entry while the candidates are cut to k, and while master and moments are carried over.
_CUT, _CARRY = 56, 72


def selection_memory(
    rows: int,
    columns: int,
    k: int,
    lra_rank: int,
    solver: str,
    itemsize: int,
    tile_entries: int = TILE_ENTRIES,
    block_rows: int = 1,
) -> int:
    """Estimate the peak of selecting in one matrix, without the matrix itself.

    Args:
        rows: m.
        columns: n.
        k: entries selected.
        lra_rank: r.
        solver: "svd", "gram" or "chebyshev"; of the last, which may fall back to "gram", the larger of the two.
        itemsize: bytes of an entry of the weight.
        tile_entries: entries of W' that are formed at a time.
        block_rows: p, rows of W' that have to be formed together.
    """
    number = max(4, itemsize)  # float64 stays, all else is computed in float32
    tile = min(max(tile_entries, block_rows * columns), rows * columns)
    ranking = 3 * number * tile + _CANDIDATE * min(2 * k + tile, rows * columns) + _CUT * k
    if lra_rank >= min(rows, columns):
        return ranking
    factors = 2 * number * lra_rank * (rows + columns)
    return factors + max(_factoring(rows, columns, lra_rank, solver, number), ranking)


def _factoring(rows: int, columns: int, lra_rank: int, solver: str, number: int) -> int:
    short, entries = min(rows, columns), rows * columns
    if solver == "svd":
        return number * (3 * entries + 5 * short**2)
    gram = _EIGH * short**2 + 2 * min(TILE_ENTRIES, entries)
    if solver == "gram":
        return number * gram
    blocks = (_BLOCKS * 3 * lra_rank // 2 + _SAMPLE) * short
    return number * max(gram, short**2 + max(2 * min(TILE_ENTRIES, entries), blocks))


def carry_memory(k: int) -> int:
    """Estimate the peak of carrying master and moments of k entries over to a new index."""
    return _CARRY * k


def tile_entries_within(
    bound: int, rows: int, columns: int, k: int, lra_rank: int, solver: str, itemsize: int, block_rows: int = 1
) -> int | None:
    """Return the largest tile with which selecting in a matrix stays within a bound; None where none does.

    Args:
        bound: bytes.
        rows: m, and the other arguments as for `selection_memory`.
    """
    tile = TILE_ENTRIES
    least = block_rows * columns
    while selection_memory(rows, columns, k, lra_rank, solver, itemsize, tile, block_rows) > bound:
        if tile <= least:
            return None
        tile = max(least, tile // 2)
    return tile
