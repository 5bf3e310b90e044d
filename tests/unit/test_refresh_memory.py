"""Pins down that a refresh stays within its bound on memory: the estimates are not below what the allocator counts, nor
far above it, however a host and a device rank; tiles do not change a selection; a bound that cannot be kept is refused
with what would be enough.

The estimates are upper bounds of temporaries whose lifetimes depend on the version of torch: up to three times as much.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import cases
import pytest
import torch
from helpers import rank_as

import lift_ds
from benchmarks.measure.counting import allocated_peak
from lift_ds.refresh.carry import PrincipalState, carry_over
from lift_ds.refresh.schedule import plan_refresh
from lift_ds.selection import MatrixSize, SelectionSettings, low_rank
from lift_ds.selection.memory import carry_memory, selection_memory, within
from lift_ds.selection.precision import tiles
from lift_ds.selection.topk import RunningTopK, top_k_positions

FORMS = ["host", "device"]
SHAPES = [(256, 1024), (1024, 256), (512, 512)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("solver", ["chebyshev", "gram", "svd"])
@pytest.mark.parametrize(("dtype", "tile_entries"), [(torch.float32, 2**24), (torch.bfloat16, 2**14)])
@pytest.mark.parametrize("shape", SHAPES)
def test_selecting_takes_no_more_than_estimated(
    shape: tuple[int, int],
    dtype: torch.dtype,
    tile_entries: int,
    solver: str,
    form: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rank_as(form, monkeypatch)
    rows, columns = shape
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for k in (rows * columns // 20, rows * columns // 3):
        settings = SelectionSettings(k, 32, solver, tile_entries=tile_entries)
        estimate = selection_memory(MatrixSize(rows, columns, weight.element_size()), settings)
        peak = allocated_peak(
            lambda k=k: lift_ds.selection.principal_indices(  # type: ignore[misc]
                weight, k=k, lra_rank=32, solver=solver, tile_entries=tile_entries
            )
        )
        # Where a sample bounds the threshold, fewer candidates are held than there may be.
        assert estimate / 4 < peak <= estimate


def test_carrying_over_takes_no_more_than_estimated() -> None:
    k = 50_000
    old, new = (torch.randperm(10**6)[:k].sort().values.int() for _ in range(2))
    state, current = PrincipalState(*(torch.randn(k) for _ in range(3))), torch.randn(k)
    held = 3 * 4 * k  # the state itself, gathered
    assert carry_memory(k) / 3 < allocated_peak(lambda: carry_over(old, state, new, current)) + held <= carry_memory(k)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("solver", ["gram", "svd", "chebyshev"])
def test_tiles_do_not_change_a_selection(solver: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rank_as(form, monkeypatch)
    weight = torch.randn(96, 130, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    whole = lift_ds.principal_indices(weight, k=700, lra_rank=9, solver=solver)
    for tile_entries in (1, 131, 1000, 5000):
        tiled = lift_ds.principal_indices(weight, k=700, lra_rank=9, solver=solver, tile_entries=tile_entries)
        assert torch.equal(tiled, whole)


@pytest.mark.parametrize("shape", [(40, 130), (130, 40)])
def test_a_product_in_tiles_is_the_whole_product(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The Gram matrix of a large matrix is added up from tiles of a fixed size; here they are made small."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    whole = low_rank.gram(weight, 7)
    monkeypatch.setattr(low_rank, "tiles", partial(tiles, entries=1000))
    assert len(list(low_rank.tiles(130, 40))) == 6
    left, right = low_rank.gram(weight, 7)
    torch.testing.assert_close(left @ right, whole[0] @ whole[1], rtol=1e-10, atol=1e-10)  # another order of sums


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k", [1, 7, 50, 119, 120])
def test_the_largest_of_pieces_are_the_largest_of_all(k: int, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With many ties, of which the first are taken."""
    rank_as(form, monkeypatch)
    generator = torch.Generator().manual_seed(k)
    for _ in range(20):
        scores = torch.randint(0, 6, (120,), generator=generator).float()
        pieces = scores.split(torch.randint(1, 40, (1,), generator=generator).item())
        running = RunningTopK(k, scores.device)
        for piece in pieces:
            running.add(piece)
        assert torch.equal(running.positions(), top_k_positions(scores, k))


def test_the_largest_tile_within_the_bound_is_taken() -> None:
    matrix = MatrixSize(2048, 4096, itemsize=2)
    settings = SelectionSettings(400_000, 2048, "gram")  # the rank is the whole: nothing is factored

    def taken(tile_entries: int) -> int:
        return selection_memory(matrix, replace(settings, tile_entries=tile_entries))

    def tile_within(bound: int) -> int | None:
        found = within(bound, matrix, settings)
        return None if found is None else found.tile_entries

    least, roomy = taken(4096), taken(2**24)
    assert tile_within(least - 1) is None
    assert tile_within(least) == 4096
    assert tile_within(roomy) == 2**24
    between = tile_within((least + roomy) // 2)
    assert between is not None
    assert 4096 < between < 2**24


def test_a_bound_that_cannot_be_kept_is_refused_with_what_is_needed() -> None:
    config = lift_ds.LiftConfig(density=0.1, lra_rank=8, refresh_memory_gib=1e-6)
    with pytest.raises(ValueError, match=r"refresh_memory_gib=1e-06: refreshing model\.layers\.0.* needs at least \d"):
        lift_ds.attach(cases.small_llama(), config)


def test_a_copy_of_the_weight_counts_where_it_is_collected() -> None:
    config = lift_ds.LiftConfig(density=0.1, lra_rank=8, refresh_memory_gib=0.009)
    sizes = {"a": MatrixSize(512, 1024, itemsize=4)}
    plan_refresh(sizes, config, ranks=2, collected=False, device_type="cpu")
    with pytest.raises(ValueError, match="refresh_memory_gib"):
        plan_refresh(sizes, config, ranks=2, collected=True, device_type="cpu")


def test_no_rank_selects_more_than_its_share_and_one_matrix() -> None:
    shapes = {f"layer{i}.{name}": shape for i in range(5) for name, shape in {"q": (64, 64), "up": (170, 64)}.items()}
    config = lift_ds.LiftConfig(density=0.1, lra_rank=8)
    for ranks in (1, 2, 3, 4, 16):
        sizes = {name: MatrixSize.of(shape, 2) for name, shape in shapes.items()}
        plan = plan_refresh(sizes, config, ranks, collected=True, device_type="cpu")
        (jobs,) = plan.parts.values()
        assert sorted(name for names in jobs for name in names) == sorted(shapes)
        entries = [sum(shapes[name][0] * shapes[name][1] for name in names) for names in jobs]
        assert max(entries) <= sum(entries) / ranks + 170 * 64
        assert jobs == [plan.jobs_of(rank) for rank in range(ranks)]
