"""Gathering and writing principal entries by the stored index does to the bit what plain indexing by positions does,
by torch's operators, by the Triton kernel (run by Triton's interpreter where there is no GPU) and by the compiled
kernel of the host: for every form of the index, for the whole matrix and for every piece of it, and leaves everything
else alone. On the host that holds for any number of threads, and by a corrupt index nothing outside is written.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import same_bits
from test_encoding import BLOCKED, some_blocks
from torch import Tensor

from lift_ds.index import access as ways
from lift_ds.index.access import Access, access_to
from lift_ds.index.encoding import CompactIndex, IndexLayout, encode
from lift_ds.index.kernels import torch_access
from lift_ds.index.kernels.torch_access import TorchAccess

#: Where the Triton kernel runs here.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _triton_entries(index: CompactIndex) -> Access:
    from lift_ds.index.kernels.triton_access import TritonAccess

    return TritonAccess(index)


def _device_entries(index: CompactIndex) -> Access:
    """By torch's operators as on a device, wherever it is."""
    entries = TorchAccess(index)
    entries._on_host = False
    return entries


def _host_entries(index: CompactIndex) -> Access:
    from lift_ds.index.kernels.host_access import HostAccess

    return HostAccess(index)


without_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is for Linux alone")
without_host = pytest.mark.skipif(
    importlib.util.find_spec("lift_ds.index.kernels._host") is None, reason="installed without a C compiler"
)
#: How to make the entries, and the device of the tensors.
KINDS = [
    pytest.param(TorchAccess, DEVICE, id="torch"),
    pytest.param(_device_entries, DEVICE, id="torch, as on a device"),
    pytest.param(_triton_entries, DEVICE, id="triton", marks=without_triton),
    pytest.param(_host_entries, "cpu", id="host", marks=without_host),
]
Maker = Callable[[CompactIndex], Access]
#: Beside blocks and wide ones: one entry, all, rows without any, a row longer than a program's chunk, odd numbers.
CASES = [
    *((rows, columns, block_shape, count) for rows, columns, block_shape, count in BLOCKED if rows * columns < 300_000),
    (1, 1, (1, 1), 1), (3, 5, (1, 1), 15), (7, 11, (1, 1), 4), (3, 2_000, (1, 1), 1_501), (3, 65_535, (1, 1), 999),
    (3, 65_540, (1, 1), 999),
]  # fmt: skip


def compact(
    rows: int, columns: int, block_shape: tuple[int, int], count: int, device: str
) -> tuple[CompactIndex, Tensor]:
    """An index as it is stored, and its positions."""
    positions = some_blocks(rows, columns, block_shape, count).to(device)
    layout = IndexLayout(rows, columns, positions.numel(), block_shape)
    return CompactIndex(encode(positions, rows, columns, block_shape), layout), positions


def pieces(size: int, columns: int) -> list[tuple[int, int]]:
    """Ranges of flat positions: all, tiles of rows, cuts within rows, none."""
    middle = size // 2
    rows = [(0, columns), (columns, size), (size - columns, size)]
    return [(0, size), *rows, (0, middle), (middle, size), (size // 3, size // 3 + 1), (middle, middle)]


def numbers(count: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(count)).to(device, dtype)


@pytest.mark.parametrize(("make", "device"), KINDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gather_is_plain_indexing(make: Maker, device: str, case: tuple[int, int, tuple[int, int], int]) -> None:
    index, positions = compact(*case, device)
    entries, matrix = make(index), numbers(case[0] * case[1], torch.float32, device)
    for start, stop in pieces(matrix.numel(), case[1]):
        out = numbers(positions.numel(), torch.float32, device)
        inside = (positions >= start) & (positions < stop)
        expected = torch.where(inside, matrix[positions], out)
        entries.gather(matrix[start:stop], start, out)
        assert same_bits(out, expected), (start, stop)


@pytest.mark.parametrize(("make", "device"), KINDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_put_is_plain_indexing_and_touches_nothing_else(
    make: Maker, device: str, case: tuple[int, int, tuple[int, int], int]
) -> None:
    index, positions = compact(*case, device)
    entries, values = make(index), numbers(positions.numel(), torch.float32, device)
    for start, stop in pieces(case[0] * case[1], case[1]):
        matrix = numbers(case[0] * case[1], torch.float32, device)
        expected = matrix.clone()
        inside = (positions >= start) & (positions < stop)
        expected[positions[inside]] = values[inside]
        entries.put(matrix[start:stop], start, values)
        assert same_bits(matrix, expected), (start, stop)


@pytest.mark.parametrize(("make", "device"), KINDS)
@pytest.mark.parametrize("held", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("trained", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_values_take_the_dtype_of_the_receiver(
    make: Maker, device: str, held: torch.dtype, trained: torch.dtype
) -> None:
    index, positions = compact(24, 40, (1, 1), 300, device)
    entries, matrix, values = make(index), numbers(960, torch.float32, device), numbers(300, torch.float32, device)
    if make is _triton_entries and device == "cpu":
        # Triton's interpreter cuts off what bf16 has no digits for; compiled, Triton rounds to nearest even, as torch.
        matrix, values = matrix.mul(16).round(), values.mul(16).round()
    matrix, values = matrix.to(held), values.to(trained)
    out = torch.zeros_like(values)
    entries.gather(matrix, 0, out)
    assert same_bits(out, matrix[positions].to(trained))
    entries.put(matrix, 0, values)
    assert same_bits(matrix[positions], values.to(held))


def test_tiles_of_rows_put_together_are_the_whole() -> None:
    """Also by the way torch's operators take on a device, which does not ask which entries are inside."""
    index, positions = compact(12, 30, (1, 1), 100, DEVICE)
    entries, matrix = TorchAccess(index), numbers(360, torch.float32, DEVICE)
    by_tiles, unasked = torch.zeros(2, 100, device=DEVICE)
    for start in range(0, 360, 90):
        entries.gather(matrix[start : start + 90], start, by_tiles)
        entries._gather_where_inside(matrix[start : start + 90], start, unasked)
    assert same_bits(by_tiles, matrix[positions])
    assert same_bits(unasked, matrix[positions])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_on_the_host_an_index_decoded_by_parts_is_the_whole(
    case: tuple[int, int, tuple[int, int], int], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of one row of blocks, of several, and rows without any."""
    monkeypatch.setattr(torch_access, "_CHUNK", chunk)
    index, _ = compact(*case, "cpu")
    positions, size = index.positions().long(), case[0] * case[1]
    for start, stop in pieces(size, case[1]):
        parts = list(TorchAccess(index)._parts(start, stop - start))
        found = torch.cat([positions[:0], *(part + offset + start for _, offset, part in parts)])
        assert torch.equal(found, positions[(positions >= start) & (positions < stop)])
        assert [j for own, _, _ in parts for j in range(own.start, own.stop)] == [
            j for j, position in enumerate(positions.tolist()) if start <= position < stop
        ]


#: More entries than one thread gets, in each form of the index: columns, wide positions, blocks.
LARGE = [(300, 2_000, (1, 1), 180_000), (9, 70_000, (1, 1), 150_000), (300, 2_000, (4, 5), 9_000)]


@without_host
@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_of_the_host_copy_what_one_copies(
    case: tuple[int, int, tuple[int, int], int], threads: int, several_threads: Callable[[int], None]
) -> None:
    index, positions = compact(*case, "cpu")
    size, values = case[0] * case[1], numbers(positions.numel(), torch.float64)
    entries, plain = _host_entries(index), TorchAccess(index)
    several_threads(threads)
    for start, stop in pieces(size, case[1]):
        matrix, out = numbers(size, torch.float64), values.clone()
        expected, expected_out = matrix.clone(), values.clone()
        plain.gather(matrix[start:stop], start, expected_out)
        entries.gather(matrix[start:stop], start, out)
        assert same_bits(out, expected_out), (start, stop)
        plain.put(expected[start:stop], start, values)
        entries.put(matrix[start:stop], start, values)
        assert same_bits(matrix, expected), (start, stop)


@pytest.fixture
def several_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@without_host
def test_the_host_rounds_every_number_as_torch() -> None:
    """Any pattern of bits, ties and infinities among them; which NaN torch writes depends on the processor."""
    patterns = torch.randint(-(2**31), 2**31, (2**16,), generator=torch.Generator().manual_seed(1)).int()
    patterns[:4096] = patterns[:4096] & -(2**16) | 2**15  # halfway between two numbers of bf16
    patterns[:4] = torch.tensor([0x7F800000, 0x7FFFFFFF, 0x7F7FFFFF, 0x00007FFF])  # inf, NaN, the largest, a subnormal
    exact, nan = patterns.view(torch.float32), torch.zeros(()).bfloat16()
    layout = IndexLayout(16, 4096, 2**16)
    entries = _host_entries(CompactIndex(encode(torch.arange(2**16), 16, 4096), layout))
    put, gathered = torch.zeros(2, 2**16, dtype=torch.bfloat16)
    entries.put(put, 0, exact)
    entries.gather(exact, 0, gathered)
    for found in (put, gathered):
        assert torch.equal(found.isnan(), exact.isnan())
        assert same_bits(torch.where(found.isnan(), nan, found), torch.where(exact.isnan(), nan, exact.bfloat16()))
    back, forth = torch.zeros(2, 2**16)
    entries.gather(put, 0, back)
    entries.put(forth, 0, put)
    assert same_bits(back, put.float())
    assert same_bits(forth, put.float())


@without_host
@pytest.mark.parametrize("case", [(24, 40, (1, 1), 300), (24, 40, (2, 4), 30), (3, 65_540, (1, 1), 999)], ids=str)
def test_a_corrupt_index_reaches_nothing_outside(case: tuple[int, int, tuple[int, int], int]) -> None:
    """Any columns, any wide positions, any counts: what lies around the piece and around the values stays."""
    index, positions = compact(*case, "cpu")
    size, generator = case[0] * case[1], torch.Generator().manual_seed(3)
    counts = 0 if index.layout.wide else case[0] // case[2][0] // 2  # the words with row counts
    for start, stop in pieces(size, case[1]):
        words = torch.randint(-(2**31), 2**31, index.words.shape, generator=generator).int()
        words[:counts] = index.words[:counts]
        entries = _host_entries(CompactIndex(words, index.layout))
        around, values_around = torch.zeros(stop - start + 2 * 70_000), torch.zeros(positions.numel() + 2 * 70_000)
        piece, values = around[70_000:-70_000], values_around[70_000:-70_000]
        entries.put(piece, start, torch.ones_like(values))
        piece.fill_(1.0)
        entries.gather(piece, start, values)
        for whole in (around, values_around):
            assert not whole[:70_000].any()
            assert not whole[-70_000:].any()


@without_host
@pytest.mark.parametrize("wrong", ["counts", "words", "values", "start"])
def test_sizes_that_contradict_each_other_are_refused(wrong: str) -> None:
    index, positions = compact(24, 40, (1, 1), 300, "cpu")
    words, values, start = index.words.clone(), torch.ones(positions.numel()), 0
    if wrong == "counts":
        words[3] += 1
    elif wrong == "words":
        words = words[:-1]
    elif wrong == "values":
        values = values[:-1]
    else:
        start = 1
    entries, matrix = _host_entries(CompactIndex(words, index.layout)), torch.zeros(960)
    with pytest.raises(ValueError, match=r"counts|words|values|range"):
        entries.put(matrix, start, values)
    assert not matrix.any()


@without_host
def test_on_the_host_it_is_the_compiled_kernel() -> None:
    from lift_ds.index.kernels.host_access import HostAccess

    index, _ = compact(3, 5, (1, 1), 4, "cpu")
    assert isinstance(access_to(index), HostAccess)


def test_on_a_host_without_the_kernel_it_is_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an install without a C compiler leaves it; said once."""
    monkeypatch.setitem(sys.modules, "lift_ds.index.kernels._host", None)
    monkeypatch.delitem(sys.modules, "lift_ds.index.kernels.host_access", raising=False)
    said: list[str] = []
    monkeypatch.setattr(ways.get_logger(), "warning", said.append)
    ways._has_host_kernel.cache_clear()
    try:
        index, _ = compact(3, 5, (1, 1), 4, "cpu")
        assert isinstance(access_to(index), TorchAccess)
        assert isinstance(access_to(index), TorchAccess)
    finally:
        ways._has_host_kernel.cache_clear()
    assert len(said) == 1
    assert "host kernel" in said[0]
