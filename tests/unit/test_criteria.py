"""Pins down the criteria: each selects what the reference does, tile by tile and in blocks; `random` depends on seed,
name and position alone; nothing is factored for those that do not look at W'; and a criterion of one's own trains.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lift_ds
from lift_ds import reference
from lift_ds.config import CRITERIA, LiftConfig
from lift_ds.selection import MatrixSize, criteria, select, select_principal, selection_cost
from lift_ds.selection.criteria import Matrix, Scores, criterion
from lift_ds.selection.memory import selection_memory
from lift_ds.selection.settings import settings_for

SHAPE, NAME = (96, 160), "layers.3.up_proj"
OF_WEIGHT = ["principal", "magnitude", "smallest", "random"]


def settings(name: str, **other: object):
    config = LiftConfig(density=0.05, lra_rank=8, criterion=name, **other)  # type: ignore[arg-type]
    return settings_for(MatrixSize.of(SHAPE, 4), config, "cpu")


def weight(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(5)).to(dtype)


def expected(name: str, w: torch.Tensor, found, seed: int = 0, layer: str = NAME) -> torch.Tensor:
    scores = reference.criterion_scores(w, name, 8, seed, layer)
    return reference.largest_mask(scores, found.k, found.block_shape).flatten().nonzero().squeeze(1)


@pytest.mark.parametrize("block_shape", [(1, 1), (4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OF_WEIGHT)
def test_each_selects_what_the_reference_does(
    name: str, dtype: torch.dtype, block_shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "SAMPLE_SCORES", 64)  # so that a sample bounds the threshold from below
    how, w = settings(name, block_shape=block_shape), weight(dtype)
    for tile_entries in (1000, 2**24):
        found = select_principal(w, select.SelectionSettings(**{**vars(how), "tile_entries": tile_entries}), name=NAME)
        assert torch.equal(found.index, expected(name, w, how))


def test_random_depends_on_seed_and_name_alone() -> None:
    how = settings("random")
    first = select_principal(weight(), how, name=NAME).index
    assert torch.equal(first, select_principal(3 * weight() + 1, how, name=NAME).index)
    other_seed = settings("random", seed=7)
    seeded = select_principal(weight(), other_seed, name=NAME).index
    assert torch.equal(seeded, expected("random", weight(), how, seed=7))
    for other in (seeded, select_principal(weight(), how, name="layers.4.up_proj").index):
        shared = torch.isin(first, other).float().mean()
        assert 0.01 < shared < 0.12  # 5% by chance, 768 entries


def test_random_spreads_evenly() -> None:
    """Rows, columns and low bits of the positions hold as much of a large selection as chance gives them."""
    m, n, k = 512, 768, 100_000
    scores = criteria.random(Matrix(torch.empty(m, n), None, NAME, 0))(slice(None), slice(None))
    assert scores.unique().numel() > 0.98 * m * n  # 24 bits: some meet
    mask = (scores >= scores.flatten().topk(k).values[-1]).float()
    for axis in (0, 1):
        counts = mask.sum(axis)
        chance = (counts.mean() * (1 - k / (m * n))) ** 0.5  # standard deviation of a binomial count
        assert 0.85 < counts.std() / chance < 1.15
    for step in (2, 3, 16):  # at least 1536 entries
        assert abs(mask[::step, ::step].mean() - mask.mean()) < 0.04


@pytest.mark.parametrize("name", CRITERIA)
def test_what_is_factored(name: str) -> None:
    size, how = MatrixSize.of((1024, 1024), 2), LiftConfig(density=0.05, criterion=name)
    found = settings_for(size, how, "cpu")
    factored = name in ("principal", "smallest")
    assert (found.lra_rank < 1024) == factored
    plain = settings_for(size, LiftConfig(density=0.05), "cpu")
    assert (selection_memory(size, found) < selection_memory(size, plain)) == (not factored)
    assert (selection_cost(1024, 1024, found.lra_rank, found.solver) < 10**9) == (not factored)


def test_chebyshev_watches_the_largest_alone() -> None:
    assert (
        settings_for(MatrixSize.of((4096, 4096), 2), LiftConfig(density=0.05, criterion="smallest"), "cpu").solver
        == "gram"
    )
    with pytest.raises(ValueError, match=r"solver='chebyshev' .* criterion='smallest' .* 'gram' or 'svd'"):
        settings("smallest", solver="chebyshev")
    assert settings("random", solver="chebyshev").lra_rank == min(SHAPE)  # where nothing is factored it does not matter


def test_a_wrong_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"criterion='magnitud' is not one of .*did you mean 'magnitude'"):
        LiftConfig(density=0.05, criterion="magnitud")


@pytest.mark.parametrize("name", [name for name in OF_WEIGHT if name != "principal"])
def test_training_follows_the_reference(name: str) -> None:
    """Six steps with refreshes; tolerance as of other plain training: float32 sums in another order."""
    config = LiftConfig(density=0.1, lra_rank=4, refresh_interval=2, criterion=name, lr=1e-2, seed=3)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32, bias=False), nn.Tanh(), nn.Linear(32, 16, bias=False))
    weights = {f"{i}": model[i].weight.detach().clone().requires_grad_() for i in (0, 2)}
    oracle = reference.ReferenceLift(weights, config)
    lift_ds.attach(model, config)
    optimizer = lift_ds.LiftAdamW(model, lr=1e-2)
    for _ in range(6):
        x = torch.randn(8, 24)
        model(x).square().sum().backward()
        (torch.tanh(x @ weights["0"].T) @ weights["2"].T).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        oracle.step()
        for place, index in oracle.indices().items():
            assert torch.equal(model[int(place)].lift_weight.principal_index.long(), index)
            torch.testing.assert_close(model[int(place)].weight, weights[place], rtol=1e-5, atol=1e-6)


def test_one_of_your_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criteria, "_REGISTERED", dict(criteria._REGISTERED))
    monkeypatch.setattr("lift_ds.config.CRITERIA", CRITERIA)
    try:

        @criterion("outlying")
        def outlying(matrix: Matrix) -> Scores:
            mean = matrix.weight.float().mean()
            return lambda rows, columns: (matrix.entries(rows, columns) - mean).abs()

        w = weight() + 2
        mask = reference.largest_mask((w - w.mean()).abs(), settings("outlying").k)
        assert torch.equal(select_principal(w, settings("outlying")).index, mask.flatten().nonzero().squeeze(1))
        with pytest.raises(ValueError, match="criterion 'random' is there already"):
            criterion("random")(outlying)
    finally:
        CRITERIA.remove("outlying")
