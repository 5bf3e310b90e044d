"""What a refresh takes in memory beside what training holds, and how small its tiles must be to stay within a bound.

Upper estimates, in bytes; `tests/unit/test_refresh_memory.py` holds them against the allocator.
"""

from __future__ import annotations

import dataclasses

from lift_ds.selection.precision import TILE_ENTRIES
from lift_ds.selection.settings import MatrixSize, SelectionSettings
from lift_ds.selection.topk import SAMPLE_SCORES

_GIB = 2**30

#: Blocks of 3/2 r vectors that "chebyshev" holds at most beside its Gram matrix, and the columns of W' it samples.
_BLOCKS, _COLUMNS = 12, 5 * 128
#: Numbers a symmetric eigensolver holds per entry of its matrix: the matrix, the vectors, twice that as workspace.
_EIGH = 4
#: Bytes a candidate of the ranking takes: score, position, both once more where pieces are joined, and a mask.
_CANDIDATE = 17
#: Numbers an entry takes of a sample of W': itself, its score, and that once more with its position.
_SAMPLED = 4
#: Bytes per selected entry where blocks become entries, and while master and moments are carried over.
_SELECTED, _CARRY = 24, 72


def selection_memory(matrix: MatrixSize, settings: SelectionSettings) -> int:
    """Estimate the peak of selecting in one matrix, without the matrix itself.

    Args:
        matrix: its size.
        settings: what is selected, and how; "chebyshev" may fall back to "gram", so it counts as the larger of the two.
    """
    number = max(4, matrix.itemsize)  # float64 stays, all else is computed in float32
    least = settings.block_shape[0] * matrix.columns  # rows of W' that have to be formed together
    tile = min(max(settings.tile_entries, least), matrix.entries)
    ranking = 3 * number * tile + _CANDIDATE * min(2 * settings.k + tile, matrix.entries) + _SELECTED * settings.k
    block = settings.block_shape[0] * settings.block_shape[1]
    ranking = max(ranking, _SAMPLED * number * min(SAMPLE_SCORES * block, matrix.entries))
    if settings.lra_rank >= min(matrix.rows, matrix.columns):
        return ranking
    factors = 2 * number * settings.lra_rank * (matrix.rows + matrix.columns)
    return factors + max(number * _factoring(matrix, settings), ranking)


def _factoring(matrix: MatrixSize, settings: SelectionSettings) -> int:
    """Estimate how many numbers are held while the matrix is factored."""
    short, entries = min(matrix.rows, matrix.columns), matrix.entries
    if settings.solver == "svd":
        return 3 * entries + 5 * short**2
    gram = _EIGH * short**2 + 2 * min(TILE_ENTRIES, entries)
    if settings.solver == "gram":
        return gram
    blocks = (_BLOCKS * 3 * settings.lra_rank // 2 + _COLUMNS) * short
    return max(gram, short**2 + max(2 * min(TILE_ENTRIES, entries), blocks))


def gradient_entries(largest: int, gib: float | None) -> int:
    """Return of how many entries the criterion "gradient" may hold gradients at a time, 4 bytes each.

    Args:
        largest: entries of the largest matrix; fewer cannot be.
        gib: the bound, `refresh_memory_gib` of the configuration, of which they take half; None for as few as can be.
    """
    return largest if gib is None else max(largest, int(gib * _GIB / 2) // 4)


def carry_memory(k: int) -> int:
    """Estimate the peak of carrying master and moments of k entries over to a new index."""
    return _CARRY * k


def within(bound: int, matrix: MatrixSize, settings: SelectionSettings) -> SelectionSettings | None:
    """Return the settings with the largest tile for which a selection stays within a bound; None where none does.

    Args:
        bound: bytes.
        matrix: its size.
        settings: the tile in it is not looked at.
    """
    tile, least = TILE_ENTRIES, settings.block_shape[0] * matrix.columns
    while True:
        settings = dataclasses.replace(settings, tile_entries=tile)
        if selection_memory(matrix, settings) <= bound:
            return settings
        if tile <= least:
            return None
        tile = max(least, tile // 2)


def bounded(
    name: str, matrix: MatrixSize, settings: SelectionSettings, gib: float | None, *, reserved: int = 0, held: int = 0
) -> SelectionSettings:
    """Return the settings for a matrix with the largest tile that a bound on memory allows.

    Args:
        name: of the layer, for the message of an error.
        matrix: its size.
        settings: how to select there.
        gib: the bound, `refresh_memory_gib` of the configuration; None for none.
        reserved: bytes of the bound that other things take meanwhile.
        held: those of them that are there while states are carried over.

    Raises:
        ValueError: when the bound is too low; says what the matrix needs.
    """
    if gib is None:
        return settings
    bound = int(gib * _GIB)
    smallest = dataclasses.replace(settings, tile_entries=settings.block_shape[0] * matrix.columns)
    needed = max(reserved + selection_memory(matrix, smallest), held + carry_memory(settings.k))
    fitting = within(bound - reserved, matrix, settings)
    if fitting is None or needed > bound:
        raise ValueError(
            f"refresh_memory_gib={gib:g}: refreshing {name} [{matrix.rows}, {matrix.columns}] with "
            f"{settings.k:,} entries needs at least {needed / _GIB:.3g}; raise it, or leave it out for no bound"
        )
    return fitting
