"""Pins down how an index is stored: every index comes back exactly, at two bytes an entry and two a row; matrices wider
than 65,535 store int32 positions; an index of blocks stores its blocks, and comes back as entries in ascending order.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lift_ds.index.encoding import CompactIndex, IndexLayout, encode, word_count
from lift_ds.model.parameters import PrincipalIndex


def decode(words: torch.Tensor, rows: int, columns: int, k: int, block_shape: tuple[int, int] = (1, 1)) -> torch.Tensor:
    return CompactIndex(words, IndexLayout(rows, columns, k, block_shape)).positions()


def some_positions(rows: int, columns: int, k: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 7 + k)
    return torch.randperm(rows * columns, generator=generator)[:k].sort().values


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("rows", "columns", "k"),
    [(1, 1, 1), (3, 5, 15), (7, 11, 4), (64, 48, 300), (5, 65_535, 4_000), (300, 2, 1), (4, 40_000, 150_000)],
)
def test_every_index_comes_back(rows: int, columns: int, k: int, dtype: torch.dtype) -> None:
    index = some_positions(rows, columns, k).to(dtype)
    words = encode(index, rows, columns)
    assert words.dtype == torch.int32
    assert words.numel() == word_count(rows, columns, k) == (rows + k + 1) // 2
    back = decode(words, rows, columns, k)
    assert back.dtype == torch.int32
    assert torch.equal(back.long(), index.long())


def test_a_full_row_has_more_entries_than_a_signed_number_holds() -> None:
    """Counts and columns above 32,767 wrap around when they are stored."""
    columns = 65_535
    index = torch.cat([torch.arange(columns), torch.tensor([3 * columns - 1])])  # row 0 whole, the last entry of row 2
    back = decode(encode(index, 3, columns), 3, columns, index.numel())
    assert torch.equal(back.long(), index)


#: rows, columns, blocks of (p, q), how many: narrow and wide grids, one block, all of them, rows of blocks without any.
BLOCKED = [
    (8, 12, (2, 2), 5), (8, 12, (4, 1), 7), (8, 12, (1, 4), 7), (8, 12, (8, 12), 1), (8, 12, (2, 3), 16),
    (64, 48, (16, 16), 5), (6, 131_070, (3, 2), 999), (4, 140_000, (2, 2), 501), (4, 140_000, (2, 1), 3),
    (2, 200_000, (1, 2), 100), (64, 48, (1, 1), 300),
]  # fmt: skip


def some_blocks(rows: int, columns: int, block_shape: tuple[int, int], count: int) -> Tensor:
    """Flat positions of the entries of some blocks, int64, ascending: the plain way, by a mask of the matrix."""
    p, q = block_shape
    grid = torch.zeros(rows // p, columns // q, dtype=torch.bool)
    grid.view(-1)[some_positions(rows // p, columns // q, count)] = True
    return grid.repeat_interleave(p, 0).repeat_interleave(q, 1).flatten().nonzero().flatten()


@pytest.mark.parametrize(("rows", "columns", "block_shape", "count"), BLOCKED)
def test_an_index_of_blocks_comes_back_as_its_entries(
    rows: int, columns: int, block_shape: tuple[int, int], count: int
) -> None:
    index = some_blocks(rows, columns, block_shape, count)
    p, q = block_shape
    words = encode(index, rows, columns, block_shape)
    assert words.dtype == torch.int32
    assert words.numel() == word_count(rows, columns, index.numel(), block_shape)
    assert torch.equal(words, encode(some_positions(rows // p, columns // q, count), rows // p, columns // q))
    back = decode(words, rows, columns, index.numel(), block_shape)
    assert back.dtype == torch.int32
    assert torch.equal(back.long(), index)


def test_blocks_that_do_not_fill_the_matrix_are_refused() -> None:
    with pytest.raises(AssertionError, match="do not fill"):
        word_count(9, 12, 8, (2, 2))


def test_the_first_and_last_entry_alone() -> None:
    index = torch.tensor([0, 8 * 9 - 1])
    assert decode(encode(index, 8, 9), 8, 9, 2).tolist() == [0, 71]


@pytest.mark.parametrize("columns", [65_536, 100_000])
def test_a_wider_matrix_stores_positions(columns: int) -> None:
    index = some_positions(2, columns, 1_001)
    words = encode(index, 2, columns)
    assert words.dtype == torch.int32
    assert words.numel() == word_count(2, columns, 1_001) == 1_001
    assert torch.equal(decode(words, 2, columns, 1_001).long(), index)


def test_at_five_percent_of_a_matrix_of_usual_width_it_is_a_tenth_of_a_byte_a_parameter() -> None:
    rows, columns = 4096, 11008
    held = 4 * word_count(rows, columns, round(0.05 * rows * columns))
    assert held / (rows * columns) == pytest.approx(0.1, rel=0.002)


def test_calling_the_module_gives_the_words() -> None:
    index = some_positions(6, 10, 9)
    module = PrincipalIndex(encode(index, 6, 10), IndexLayout(6, 10, 9))
    assert module.positions().tolist() == CompactIndex(module(), module.layout).positions().tolist() == index.tolist()
    assert module.word_count() == module.words.numel()
    assert not module.words.requires_grad
