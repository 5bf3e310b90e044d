"""Pins down how an index is stored: every index comes back exactly, at two bytes an entry and two a row; matrices wider
than 65,535 store int32 positions.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lift_ds.principal import PrincipalIndex
from lift_ds.selection.encoding import decode, encode, word_count


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


def test_calling_the_module_gives_the_positions() -> None:
    index = some_positions(6, 10, 9)
    module = PrincipalIndex(index, 6, 10)
    assert module().tolist() == module.positions().tolist() == index.tolist()
    assert module.word_count() == module.words.numel()
    assert not module.words.requires_grad
