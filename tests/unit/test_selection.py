"""The selection of one matrix: the k largest entries of |W'| and no others, ties by position, the same from every
solver, at every thread count.

Everything is compared with formulas that share no code with the package: numpy in float64, Python's sort.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers import numpy_low_rank, random_matrix, sorted_selection
from torch import Tensor

from lift_ds import principal_indices
from lift_ds.selection import low_rank_factors, top_k_positions

SHAPES = {"tall": (192, 64), "wide": (64, 192), "square": (128, 128)}


def power_law_matrix(rows: int, columns: int, exponent: float) -> Tensor:
    """A matrix with singular values 1 / i**exponent, as pretrained weights have: slowly decaying."""
    size = min(rows, columns)
    u = torch.linalg.qr(random_matrix(rows, size, 1).double()).Q
    v = torch.linalg.qr(random_matrix(columns, size, 2).double()).Q
    return ((u * torch.arange(1, size + 1).double() ** -exponent) @ v.T).float()


def overlap(a: Tensor, b: Tensor) -> float:
    return len(set(a.tolist()) & set(b.tolist())) / a.numel()


@pytest.mark.parametrize("k", [1, 2, 37, 119, 120])
@pytest.mark.parametrize("levels", [2, 5, None], ids=["ties of 2 levels", "ties of 5 levels", "all different"])
def test_top_k_is_that_of_a_plain_sort(levels: int | None, k: int) -> None:
    scores = random_matrix(10, 12).abs()
    if levels is not None:
        scores = (scores * levels / scores.max()).floor()
    assert top_k_positions(scores, k).tolist() == sorted_selection(scores.numpy(), k)


def test_ties_are_taken_in_order_of_position() -> None:
    assert top_k_positions(torch.tensor([[1.0, 2.0, 1.0], [1.0, 3.0, 1.0]]), 4).tolist() == [0, 1, 2, 4]
    assert top_k_positions(torch.zeros(3, 4), 5).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("k", [1, 500, 9_999])
def test_top_k_does_not_depend_on_the_thread_count(k: int) -> None:
    # A few levels only: `torch.topk` breaks ties by how the work was split.
    scores = (random_matrix(100, 100).abs() * 3).floor()
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(top_k_positions(scores, k).tolist())
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1] == results[2] == sorted_selection(scores.numpy(), k)


@pytest.mark.parametrize("solver", ["svd", "gram", "auto"])
def test_largest_entries_are_selected_not_smallest(solver: str) -> None:
    """The published code's default mask trains the smallest entries; the paper and this project take the largest."""
    # Rank 1, so that W' = W at rank 1 and the magnitudes are known: |W| = outer(1..8, 1..9).
    weight = torch.outer(torch.arange(1.0, 9.0), torch.arange(1.0, 10.0)) * torch.tensor([1.0, -1.0, 1.0] * 3)
    index = principal_indices(weight, k=3, lra_rank=1, solver=solver)
    assert index.tolist() == [6 * 9 + 8, 7 * 9 + 7, 7 * 9 + 8]  # 7*9, 8*8, 8*9
    selected = torch.zeros(72, dtype=torch.bool)
    selected[principal_indices(weight, k=20, lra_rank=1, solver=solver)] = True
    magnitudes = weight.flatten().abs()
    # Products of whole numbers up to 72: rounding of W' (1e-6 relative) reorders equal products at most.
    assert magnitudes[selected].min() >= magnitudes[~selected].max()


@pytest.mark.parametrize("solver", ["svd", "gram"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rank", [1, 8, 63])
def test_approximation_is_that_of_numpy(shape: tuple[int, int], rank: int, solver: str) -> None:
    weight = power_law_matrix(*shape, 0.7)
    factors = low_rank_factors(weight, rank, solver)
    assert factors is not None
    assert factors[0].shape == (shape[0], rank)
    assert factors[1].shape == (rank, shape[1])
    expected = torch.from_numpy(numpy_low_rank(weight, rank))
    error = (factors[0] @ factors[1] - expected).norm() / expected.norm()
    # float32 has 6e-8; where the singular values r and r + 1 are close (rank 63: 1% apart) the subspace turns by that
    # over their relative gap, 6e-6 measured.
    assert error < 2e-5


@pytest.mark.parametrize("solver", ["svd", "gram", "auto"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_selection_in_float64_is_exactly_that_of_numpy(shape: tuple[int, int], solver: str) -> None:
    # In float64 the errors (1e-14) are far below the distance of neighbouring magnitudes, so the sets are the same.
    weight = power_law_matrix(*shape, 0.5).double()
    index = principal_indices(weight, k=1000, lra_rank=8, solver=solver)
    assert index.dtype == torch.int64
    assert index.tolist() == sorted_selection(numpy_low_rank(weight, 8), 1000)


@pytest.mark.parametrize("exponent", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("shape", [(768, 192), (192, 768), (384, 384)], ids=["tall", "wide", "square"])
@pytest.mark.parametrize("rank", [8, 64])
def test_gram_selects_what_svd_selects(shape: tuple[int, int], exponent: float, rank: int) -> None:
    # DESIGN: at least 0.9999. Both solvers round in float32, so entries within that of the threshold may fall on either
    # side: of the 36,864 selected here three may differ (two at most do).
    weight = power_law_matrix(*shape, exponent)
    k = weight.numel() // 4
    by_svd, by_gram = (principal_indices(weight, k=k, lra_rank=rank, solver=solver) for solver in ("svd", "gram"))
    assert overlap(by_svd, by_gram) >= 0.9999


@pytest.mark.parametrize("solver", ["svd", "gram", "auto"])
@pytest.mark.parametrize("rank", [6, 9, 128])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_rank_of_the_smaller_side_ranks_the_matrix_itself(shape: tuple[int, int], rank: int, solver: str) -> None:
    weight = random_matrix(*shape)
    assert principal_indices(weight, k=11, lra_rank=rank, solver=solver).tolist() == sorted_selection(
        weight.numpy(), 11
    )


@pytest.mark.parametrize("solver", ["svd", "gram"])
def test_low_rank_differs_from_the_matrix_itself(solver: str) -> None:
    # Guards the tests above: were W' = W always, several of them could not fail.
    weight = random_matrix(64, 64)
    low, full = (principal_indices(weight, k=400, lra_rank=rank, solver=solver) for rank in (2, 64))
    assert overlap(low, full) < 0.8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", ["svd", "gram"])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, solver: str) -> None:
    weight = random_matrix(48, 40).to(dtype)
    index = principal_indices(weight, k=200, lra_rank=4, solver=solver)
    assert torch.equal(index, principal_indices(weight.float(), k=200, lra_rank=4, solver=solver))


@pytest.mark.parametrize("solver", ["svd", "gram"])
@pytest.mark.parametrize("rank", [1, 8])
def test_double_precision_is_computed_in_float64(solver: str, rank: int) -> None:
    # A matrix of rank 1 whose entries differ by less than float32 resolves: rounded, all would tie.
    weight = torch.outer(1 + 1e-10 * torch.arange(8).double(), torch.ones(8).double())
    index = principal_indices(weight, k=16, lra_rank=rank, solver=solver)
    assert index.tolist() == list(range(48, 64))


def test_selection_leaves_the_weight_alone() -> None:
    weight = random_matrix(12, 10).requires_grad_()
    before = weight.detach().clone()
    index = principal_indices(weight, k=7, lra_rank=3)
    assert torch.equal(weight, before)
    assert weight.grad is None
    assert not index.requires_grad


def test_transposed_matrix_selects_the_transposed_entries() -> None:
    # LiftConv1D relies on it: its weight is [in, out]. In float64, for the reason above.
    weight = power_law_matrix(24, 40, 0.5).double()
    mask = torch.zeros(40, 24, dtype=torch.bool)
    mask.view(-1)[principal_indices(weight.T, k=100, lra_rank=4)] = True
    assert mask.T.flatten().nonzero().flatten().tolist() == principal_indices(weight, k=100, lra_rank=4).tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_entry_is_refused(bad: float) -> None:
    weight = random_matrix(8, 9)
    weight[3, 4] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        principal_indices(weight, k=5, lra_rank=2)


@pytest.mark.parametrize("shape", [(8,), (2, 3, 4), ()])
def test_other_than_two_dimensions_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="2-D"):
        principal_indices(torch.ones(shape), k=1, lra_rank=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, r"k=0 is not in 1\.\.72"),
        ({"k": 73}, r"k=73 is not in 1\.\.72"),
        ({"k": -1}, "k=-1 is not in"),
        ({"lra_rank": 0}, "lra_rank=0 is not at least 1"),
        ({"lra_rank": -3}, "lra_rank=-3 is not at least 1"),
        ({"solver": "randomised"}, "solver='randomised' is not one of auto, svd, gram"),
    ],
)
def test_bad_arguments_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        principal_indices(random_matrix(8, 9), **{"k": 5, "lra_rank": 2, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize("solver", ["svd", "gram"])
@pytest.mark.parametrize("k", [1, 72])
def test_one_entry_and_all_entries(solver: str, k: int) -> None:
    weight = random_matrix(8, 9)
    expected = sorted_selection(numpy_low_rank(weight, 2), k)
    assert principal_indices(weight, k=k, lra_rank=2, solver=solver).tolist() == expected
