"""Pins what selecting reads back from a device, which stands idle meanwhile: as often for one tile as for many, for any
number of columns, vectors and entries, and for "chebyshev" a few times a round. Ranking and encoding read nothing. How
a device ranks selects what the host's way does, to the bit.

Reads are counted on the host, with the way of a device chosen. Where nothing is read, tensors without data show it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from helpers import rank_as
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lift_ds.index.encoding import encode
from lift_ds.selection import Selected, SelectionSettings, low_rank, select, select_principal
from lift_ds.selection.criteria import Matrix, principal
from lift_ds.selection.precision import tiles

#: Operators whose result, or its size, is read from the memory of a device.
READING = {
    "_local_scalar_dense", "nonzero", "equal", "masked_select", "bincount",
    "_unique2", "unique_consecutive", "unique_dim",
}  # fmt: skip
#: Methods that read past the operators, as those of tensors on the host do.
READING_METHODS = {"tolist", "numpy", "cpu"}


class _Operators(TorchDispatchMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        to_host = name == "_to_copy" and kwargs.get("device") == torch.device("cpu")
        unsized = str(function) == "aten.repeat_interleave.Tensor" and kwargs.get("output_size") is None
        if name in READING or by_mask or to_host or unsized:
            self._seen.append(name)
        return function(*args, **kwargs)


class _Methods(TorchFunctionMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in READING_METHODS:
            self._seen.append(name)
        return function(*args, **(kwargs or {}))


@contextmanager
def counted_reads() -> Iterator[list[str]]:
    """The names of the reads within the context, as they happen."""
    seen: list[str] = []
    with _Methods(seen), _Operators(seen):
        yield seen


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    rank_as("device", monkeypatch)


READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x[0]),
    "bool": lambda x: bool(x[0] > 1),
    "list": lambda x: x.tolist(),
    "nonzero": lambda x: torch.nonzero(x),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "assignment by mask": lambda x: x.__setitem__(x > 0, 1.0),
    "equal": lambda x: torch.equal(x, x),
    "to the host": lambda x: x.to("cpu", torch.float16),
    "cpu": lambda x: x.cpu(),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: torch.bincount(x.long().abs()),
    "repetition": lambda x: torch.repeat_interleave(x, torch.ones(4, dtype=torch.int64)),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_read_is_counted(read: Callable[[Tensor], Any]) -> None:
    """Guards the tests below."""
    x = torch.randn(4)
    with counted_reads() as reads:
        x + x.clone()[torch.tensor([1])]
        assert not reads
        read(x)
    assert len(reads) == 1


def matrix(rows: int, columns: int, exponent: float = 0.3) -> Tensor:
    """With singular values 1 / i**exponent."""
    generator, side = torch.Generator().manual_seed(rows), min(rows, columns)
    u, v = (torch.linalg.qr(torch.randn(size, side, generator=generator)).Q for size in (rows, columns))
    return (u * torch.arange(1, side + 1) ** -exponent) @ v.T


def reads_of(weight: Tensor, settings: SelectionSettings, start: Tensor | None = None) -> tuple[Selected, int]:
    with counted_reads() as reads:
        found = select_principal(weight, settings, start)
    return found, len(reads)


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize(("solver", "reads"), [("svd", 1), ("gram", 3)])
def test_exact_solvers_read_a_fixed_number_of_times(solver: str, reads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest magnitude, by which all are finite; "gram" reads it again to scale by it, and its rounding error."""
    monkeypatch.setattr(low_rank, "tiles", partial(tiles, entries=1000))
    for shape in [(40, 60), (60, 40), (40, 600)]:
        for rank, k, tile_entries in [(4, 300, 2**24), (4, 300, 120), (20, 900, 2**24), (64, 1, 120), (4, 2_400, 120)]:
            weight = matrix(*shape)
            settings = SelectionSettings(k, rank, solver, tile_entries=tile_entries)
            assert reads_of(weight, settings)[1] == (reads if rank < 40 else 1), (shape, rank, k, tile_entries)


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("exponent", [0.3, 1.0], ids=["flat", "steep"])
def test_chebyshev_reads_a_few_times_a_round(exponent: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a round the Ritz values, the estimate and its unit. Between two rounds how many vectors are exact, if any may
    be, and whether an orthonormalisation failed: one, or three where vectors are exact. Before the first two magnitudes
    and one orthonormalisation, after the last the subspace.
    """
    seen = set()
    for rows, columns, rank in [(64, 100, 4), (64, 1000, 4), (96, 100, 16)]:
        weight = matrix(rows, columns, exponent)
        cold, _ = reads_of(weight, SelectionSettings(1000, rank, "chebyshev", tolerance=1e-3))
        for tile_entries, start in [(2**24, None), (columns, None), (columns, cold.subspace)]:
            monkeypatch.setattr(low_rank, "tiles", partial(tiles, entries=tile_entries))
            settings = SelectionSettings(1000, rank, "chebyshev", tolerance=1e-3, tile_entries=tile_entries)
            found, reads = reads_of(weight, settings, start)
            assert not found.fell_back
            between = found.rounds - 1
            assert 4 + 3 * found.rounds + between <= reads <= 4 + 3 * found.rounds + 4 * between
            seen.add(found.rounds)
    assert max(seen) > 2


@pytest.mark.parametrize("block_shape", [(1, 1), (2, 4)])
def test_ranking_and_encoding_read_nothing(block_shape: tuple[int, int]) -> None:
    with torch.device("meta"):
        weight, factors = torch.empty(64, 200), (torch.empty(64, 8), torch.empty(8, 200))
        for tile_entries in (600, 2**24):
            for low in (None, factors):
                of_entries = principal(Matrix(weight, low, "", 0))
                scores = select._BlockScores(weight.shape, of_entries, block_shape, weight.device)
                assert select._largest(scores, 100, tile_entries).shape == (100,)
        for columns in (200, 600_000):
            assert encode(torch.empty(800, dtype=torch.int64), 64, columns, block_shape).is_meta
        with pytest.raises(NotImplementedError):
            torch.nonzero(weight)


@pytest.mark.parametrize("block_shape", [(1, 1), (2, 4)])
@pytest.mark.parametrize("levels", [None, 3], ids=["all different", "ties"])
def test_a_device_ranks_as_the_host(
    block_shape: tuple[int, int], levels: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For few and for most entries, one tile and many; also where a sample of the host is not like the rest."""
    weight = torch.randn(48, 80, generator=torch.Generator().manual_seed(2))
    if levels is not None:
        weight = (weight * levels).round()
    weight[:, :8] *= 20
    for samples in (2**18, 16):
        for k in (8, 192, 1_000, 3_000, 3_832, 3_840):
            for tile_entries in (1, 500, 2**24):
                found = []
                for form in ("host", "device"):
                    rank_as(form, monkeypatch)
                    monkeypatch.setattr(select, "SAMPLE_SCORES", samples)
                    settings = SelectionSettings(k, 64, block_shape=block_shape, tile_entries=tile_entries)
                    found.append(select_principal(weight, settings).index)
                assert torch.equal(*found), (samples, k, tile_entries)
