"""Checks of the kernels that gather and write principal entries: the same bits as plain indexing by positions.

Each form of the index has a cell: single entries or blocks, 16-bit columns or wide positions. In it every pair of
dtypes is gathered and put for the whole matrix, for tiles of its rows and for pieces that begin and end anywhere, which
are not aligned in memory.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu_parts.cells import Cell
from benchmarks.measure.records import Record
from lift_ds.index.access import access_to
from lift_ds.index.encoding import CompactIndex, IndexLayout, encode

_MIXED = (torch.bfloat16, torch.float16, torch.float32)
#: Of the piece and of the values: any two that a model may have, and float64 by itself.
_DTYPES = [*itertools.product(_MIXED, _MIXED), (torch.float64, torch.float64)]

#: Where it is only to be seen that it runs, one pair of so many.
_FEWER = 5

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

#: Entries before the first one of a tensor, so that no address is a round one.
_OFFSET = 1


@dataclass(frozen=True)
class Form:
    """An index to try: of how large a matrix, of which blocks, and of which share of it."""

    rows: int
    columns: int
    block_shape: tuple[int, int] = (1, 1)
    share: float = 0.05


#: Form of the index -> matrices, on a device and where it is only to be seen that it runs.
_FORMS = {
    "entries": (Form(300, 4096), Form(12, 96)),
    "all entries of a row and none": (Form(64, 2000, share=0.9), Form(7, 33, share=0.9)),
    "wide": (Form(6, 70_000), Form(3, 65_540, share=0.001)),
    "blocks 4 x 4": (Form(64, 4096, (4, 4)), Form(8, 64, (4, 4), share=0.3)),
    "blocks 3 x 5": (Form(60, 4000, (3, 5)), Form(9, 60, (3, 5), share=0.3)),
    "wide blocks 4 x 4": (Form(8, 280_000, (4, 4)), Form(8, 262_144, (4, 4), share=0.001)),
    "wide blocks 3 x 5": (Form(6, 350_000, (3, 5)), Form(3, 327_700, (3, 5), share=0.001)),
}
#: As in a layer of a 7B model, in its dtype alone.
_LARGE = (Form(4096, 11008), Form(64, 172))


def cells(small: bool) -> list[Cell]:
    """Return the checks of the kernels."""
    forms = [
        Cell(f"kernels: {name}", check_form, (forms[small], _DTYPES[:: _FEWER if small else 1]), expected=30.0)
        for name, forms in _FORMS.items()
    ]
    large = Cell("kernels: a matrix of a 7B model", check_form, (_LARGE[small], [(torch.bfloat16, torch.bfloat16)]))
    return [*forms, large, Cell("kernels: rounding", check_rounding)]


def check_form(device: str, form: Form, dtypes: list[tuple[torch.dtype, torch.dtype]]) -> Record:
    """Gather and put by one form of an index.

    Args:
        device: "cuda" or "cpu".
        form: of the index.
        dtypes: of the piece and of the values, the pairs to try.
    """
    index, positions = make_index(form, device)
    kernel = kernel_of(index, device)
    compared = 0
    for piece_dtype, values_dtype in dtypes:
        for start, stop in pieces(form):
            _compare(index, positions, form, (piece_dtype, values_dtype), (start, stop))
            compared += 2
    return {"kernel": kernel, "entries": positions.numel(), "compared": compared}


def check_rounding(device: str) -> Record:
    """What bf16 and fp16 cannot hold is rounded as torch rounds it: ties to even, the largest to infinity."""
    form = Form(16, 4096, share=1.0)
    index, positions = make_index(form, device)
    generator = torch.Generator().manual_seed(1)
    patterns = torch.randint(-(2**31), 2**31, (positions.numel(),), generator=generator).int()
    patterns[:8192] = patterns[:8192] & -(2**16) | 2**15  # halfway between two numbers of bf16
    exact = patterns.view(torch.float32)
    exact = torch.where(exact.isnan(), 1.0, exact).to(device)  # which NaN comes out is the processor's choice
    for dtype in (torch.bfloat16, torch.float16):
        put, gathered = torch.zeros(2, positions.numel(), dtype=dtype, device=device)
        access_to(index).put(put, 0, exact)
        access_to(index).gather(exact, 0, gathered)
        require_same(put, exact.to(dtype), f"put of float32 into {dtype}")
        require_same(gathered, exact.to(dtype), f"gather of float32 into {dtype}")
    return {"kernel": kernel_of(index, device)}


def make_index(form: Form, device: str) -> tuple[CompactIndex, Tensor]:
    """Return a random index as it is stored, its words at no round address, and its positions, int64."""
    (p, q), grid = form.block_shape, form.rows * form.columns // (form.block_shape[0] * form.block_shape[1])
    chosen = torch.zeros(grid, dtype=torch.bool)
    generator = torch.Generator().manual_seed(grid)
    chosen[torch.randperm(grid, generator=generator)[: max(1, round(form.share * grid))]] = True
    if form.rows > p and form.share < 1.0:
        chosen[: form.columns // q] = False  # a row without any
    mask = chosen.view(form.rows // p, form.columns // q).repeat_interleave(p, 0).repeat_interleave(q, 1)
    positions = mask.flatten().nonzero().squeeze(1).to(device)
    words = encode(positions, form.rows, form.columns, form.block_shape)
    held = words.new_zeros(words.numel() + _OFFSET)
    held[_OFFSET:] = words
    layout = IndexLayout(form.rows, form.columns, positions.numel(), form.block_shape)
    return CompactIndex(held[_OFFSET:], layout), positions


def kernel_of(index: CompactIndex, device: str) -> str:
    """Return what reads and writes by an index on a device; an error where that is no kernel of a GPU's own."""
    name = type(access_to(index)).__name__
    if device == "cuda" and name != "TritonAccess":
        raise RuntimeError(f"{name} is used on the device, not the Triton kernel: is triton installed?")
    return name


def pieces(form: Form) -> list[tuple[int, int]]:
    """Return ranges of flat positions: all, tiles of whole blocks, pieces that begin and end anywhere, one, none."""
    size, tile = form.rows * form.columns, form.block_shape[0] * form.columns
    middle = size // 2
    anywhere = [(3, size - 1), (middle + 1, size - 5), (tile // 3, min(size, tile + 7)), (middle, middle + 1)]
    return [(0, size), (0, tile), (size - tile, size), *anywhere, (middle, middle)]


def _compare(
    index: CompactIndex,
    positions: Tensor,
    form: Form,
    dtypes: tuple[torch.dtype, torch.dtype],
    piece: tuple[int, int],
) -> None:
    """Gather from a piece of a matrix and put into it; compare with torch's own indexing."""
    (start, stop), device, (piece_dtype, values_dtype) = piece, positions.device, dtypes
    matrix = _numbers(form.rows * form.columns, piece_dtype, device)
    values = _numbers(positions.numel(), values_dtype, device)
    inside = (positions >= start) & (positions < stop)
    gathered = values.clone()
    access_to(index).gather(matrix[start:stop], start, gathered)
    expected = torch.where(inside, matrix[positions].to(values_dtype), values)
    require_same(gathered, expected, f"gather from [{start}, {stop}) of {piece_dtype} into {values_dtype}")
    expected = matrix.clone()
    expected[positions[inside]] = values[inside].to(piece_dtype)
    access_to(index).put(matrix[start:stop], start, values)
    require_same(matrix, expected, f"put of {values_dtype} into [{start}, {stop}) of {piece_dtype}")


def _numbers(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return random numbers whose first stands at no round address."""
    generator = torch.Generator(device).manual_seed(count)
    return torch.randn(count + _OFFSET, generator=generator, device=device).to(dtype)[_OFFSET:]


def require_same(found: Tensor, expected: Tensor, what: str) -> None:
    """Compare two tensors of one dtype to the bit.

    Raises:
        AssertionError: says how many numbers differ, and the first of them.
    """
    bits = _BITS[expected.element_size()]
    differs = (found.view(bits) != expected.view(bits)).nonzero().flatten()
    if differs.numel():
        first = int(differs[0])
        raise AssertionError(
            f"{what}: {differs.numel():,} of {found.numel():,} numbers differ, the first at {first}: "
            f"{found[first].item()!r} instead of {expected[first].item()!r}"
        )
