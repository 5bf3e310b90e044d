"""Pins down that every solver selects what the singular value decomposition in float64 selects, whatever the spectrum:
at least 0.995 of it; that the estimate of "chebyshev" is honest to 0.005; and that neither hangs on where it starts.

The matrices are small, so that a share is coarse: of the 6,400 entries selected here 0.005 are 32. Where the exact
selection is not a single one (equal singular values on both sides of the cut) there is nothing to compare with: there
the iteration may not claim to have found it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from benchmarks.measure.spectra import SPECTRA, matrix, perturbed
from lift_ds.selection import Selected, SelectionSettings, principal_indices, select_principal

ROWS, COLUMNS, RANK = 256, 320, 24
SMALLEST_OVERLAP, DISHONESTY = 0.995, 0.005
DETERMINED = [name for name, kind in SPECTRA.items() if kind.determined]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
KINDS = pytest.mark.parametrize("name", DETERMINED)

K = 6400  # 8%; whole blocks of 4 x 4


@cache
def weight_of(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return matrix(name, ROWS, COLUMNS, RANK, dtype=dtype)


def exact(weight: Tensor) -> Tensor:
    return principal_indices(weight.double(), k=K, lra_rank=RANK, solver="svd")


@cache
def exact_of(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return exact(weight_of(name, dtype))


def select(weight: Tensor, solver: str = "chebyshev", **settings: object) -> Selected:
    start = settings.pop("start", None)
    return select_principal(weight, SelectionSettings(K, RANK, solver, **settings), start)  # type: ignore[arg-type]


def overlap(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return torch.isin(one, other).float().mean().item()


def assert_near(found: Selected, right: Tensor) -> None:
    """Near enough to the exact selection, and no further off than it says."""
    off = 1 - overlap(found.index, right)
    assert off <= 1 - SMALLEST_OVERLAP
    assert off - found.estimate <= DISHONESTY


def assert_iterated(found: Selected) -> None:
    """Guards the tests about the iteration: they would be of "gram" otherwise."""
    assert found.solver == "chebyshev"
    assert not found.fell_back
    assert 0 < found.estimate <= 0.005


@DTYPES
@KINDS
def test_gram_selects_what_svd_selects(name: str, dtype: torch.dtype) -> None:
    assert_near(select(weight_of(name, dtype), "gram"), exact_of(name, dtype))


@DTYPES
@KINDS
def test_chebyshev_selects_what_svd_selects(name: str, dtype: torch.dtype) -> None:
    found = select(weight_of(name, dtype))
    assert_near(found, exact_of(name, dtype))
    assert_iterated(found)


@DTYPES
@KINDS
def test_a_refresh_from_the_subspace_before_selects_what_svd_selects(name: str, dtype: torch.dtype) -> None:
    before = weight_of(name, dtype)
    start = select(before).subspace
    for size in (0.05, 0.3):  # of the matrix's root mean square: churn of 1% and of about 10%
        after = perturbed(before, exact_of(name, dtype), size)
        assert_near(select(after, start=start), exact(after))


@pytest.mark.parametrize("name", ["power 0.2", "power 0.4", "gaussian", "trained-like"])
def test_the_subspace_before_saves_work(name: str) -> None:
    after = perturbed(weight_of(name), exact_of(name), 0.1)
    cold, warm = select(after), select(after, start=select(weight_of(name)).subspace)
    assert_iterated(warm)
    assert warm.products < cold.products


@KINDS
def test_transposed_matrix_selects_the_transposed_entries(name: str) -> None:
    found = select(weight_of(name).T.contiguous())
    mask = torch.zeros(COLUMNS, ROWS, dtype=torch.bool)
    mask.view(-1)[found.index] = True
    assert_iterated(found)
    assert 1 - overlap(mask.T.flatten().nonzero().flatten(), exact_of(name)) <= 1 - SMALLEST_OVERLAP


@pytest.mark.parametrize("name", ["power 0.4", "gaussian", "trained-like"])
def test_the_same_seed_gives_the_same_result(name: str) -> None:
    first, second, other = (select(weight_of(name), seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.index, second.index)
    assert first.estimate == second.estimate
    assert torch.equal(_subspace(first), _subspace(second))
    # It is the seed that decides where it starts; what comes of it is nearly the same.
    assert first.estimate != other.estimate
    assert_near(other, exact_of(name))


@DTYPES
def test_selecting_does_not_touch_the_random_state_of_the_training(dtype: torch.dtype) -> None:
    before = torch.get_rng_state()
    select(weight_of("trained-like", dtype))
    assert torch.equal(torch.get_rng_state(), before)


def _leading(count: int, *, after: int = 0) -> Tensor:
    u = torch.linalg.svd(weight_of("power 0.4")).U
    return u[:, after : after + count]


#: What makes a subspace of the right shape that is of no help, of one that is.
USELESS: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda good: torch.randn(good.shape, generator=torch.Generator().manual_seed(11)),
    "zero": torch.zeros_like,
    "one vector, repeated": torch.ones_like,
    "half of it zero": lambda good: good * (torch.arange(good.shape[1]) < good.shape[1] // 2),
    "of another matrix": lambda good: _subspace(select(weight_of("gaussian"))),
    "beyond the wanted": lambda good: _leading(good.shape[1], after=RANK),
    "trailing": lambda good: _leading(good.shape[1], after=ROWS - good.shape[1]),
    "all but the first": lambda good: _leading(good.shape[1], after=1),
}


def _subspace(found: Selected) -> Tensor:
    assert found.subspace is not None
    return found.subspace


@pytest.mark.parametrize("kind", USELESS)
def test_a_useless_start_does_no_harm(kind: str) -> None:
    weight = weight_of("power 0.4")
    good = _subspace(select(weight))
    start = USELESS[kind](good).to(good.dtype)
    assert start.shape == good.shape
    assert_near(select(weight, start=start), exact_of("power 0.4"))


@pytest.mark.parametrize("name", ["power 0.4", "trained-like", "gaussian"])
def test_a_direction_that_is_new_since_the_start_is_found(name: str) -> None:
    """As strong as the first, and orthogonal to all that was there: nothing of the start points to it."""
    before = weight_of(name)
    u, s, vh = torch.linalg.svd(before, full_matrices=True)
    after = before + 1.2 * s[0] * torch.outer(u[:, -1], vh[-1])
    assert_near(select(after, start=select(before).subspace), exact(after))


@pytest.mark.parametrize("shape", [(ROWS, 3), (ROWS - 1, 28), (0, 0), (COLUMNS, 28)], ids=str)
def test_a_start_of_another_shape_is_not_used(shape: tuple[int, int]) -> None:
    weight = weight_of("trained-like")
    assert torch.equal(select(weight, start=torch.zeros(shape)).index, select(weight).index)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-8])
@pytest.mark.parametrize("name", ["power 0.4", "gaussian", "trained-like"])
def test_a_small_tolerance_is_kept_or_the_exact_solver_takes_over(name: str, tolerance: float) -> None:
    found = select(weight_of(name), tolerance=tolerance)
    assert (found.solver == "gram") == found.fell_back
    assert found.estimate <= tolerance
    assert overlap(found.index, exact_of(name)) >= 1 - max(tolerance, 1e-3)  # of float32 the last


@pytest.mark.parametrize("name", ["power 0.2", "trained-like"])
def test_a_tolerance_that_rounding_does_not_allow_falls_back(name: str) -> None:
    found = select(weight_of(name), tolerance=1e-9)
    assert found.fell_back
    assert found.solver == "gram"
    assert torch.equal(found.index, select(weight_of(name), "gram").index)


def test_double_precision_reaches_what_single_cannot() -> None:
    found = select(weight_of("trained-like").double(), tolerance=1e-9)
    assert found.solver == "chebyshev"
    assert torch.equal(found.index, exact_of("trained-like"))


def test_a_larger_tolerance_is_less_work_and_still_honest() -> None:
    near, rough = (select(weight_of("gaussian"), tolerance=tolerance) for tolerance in (0.001, 0.05))
    assert rough.products < near.products
    off = 1 - overlap(rough.index, exact_of("gaussian"))
    assert 0.005 < off <= rough.estimate + DISHONESTY


def test_a_cut_within_equal_singular_values_is_left_to_gram_in_float64() -> None:
    """Rounding of the entries alone tells those values apart, and float32 squares of them do not."""
    found = select(weight_of("cut cluster"))
    assert found.fell_back
    assert_near(found, exact_of("cut cluster"))


def test_gram_sees_beside_what_is_far_larger() -> None:
    """Where λ_1 is 10,000 times the distance of the values at the cut, float32 squares lose them."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(ROWS, COLUMNS, generator=generator) * 1e-3
    weight[:16, :16] += torch.randn(16, 16, generator=generator)
    assert_near(select(weight, "gram"), exact(weight))


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(ROWS, COLUMNS),
        torch.ones(ROWS, COLUMNS),
        torch.outer(torch.arange(1.0, ROWS + 1), torch.arange(1.0, COLUMNS + 1)),
        torch.eye(ROWS, COLUMNS),
    ],
    ids=["zero", "ones", "rank 1", "identity"],
)
def test_degenerate_matrices_give_a_selection(weight: Tensor) -> None:
    first = select(weight)
    for found in (first, select(weight, start=first.subspace)):
        assert found.index.numel() == K
        assert (found.index.diff() > 0).all()
        assert 0 <= found.estimate <= 0.005


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("solver", ["gram", "chebyshev"])
def test_the_unit_of_a_matrix_does_not_matter(solver: str, scale: float) -> None:
    # Squares of such entries leave the range of float32, which ends at 1e-38 and 1e38.
    found = select(weight_of("trained-like") * scale, solver)
    assert_near(found, exact_of("trained-like"))
    assert found.solver == solver


@pytest.mark.parametrize("rank", [1, 2, 160, ROWS - 9, ROWS - 8, ROWS - 1])
def test_ranks_from_one_to_the_whole(rank: int) -> None:
    weight = weight_of("power 0.4")
    found = select_principal(weight, SelectionSettings(K, rank, "chebyshev"))
    assert_near(found, principal_indices(weight.double(), k=K, lra_rank=rank, solver="svd"))


def test_blocks_are_selected_as_from_the_exact_approximation() -> None:
    weight = weight_of("trained-like")
    right = principal_indices(weight.double(), k=K, lra_rank=RANK, solver="svd", block_shape=(4, 4))
    assert_near(select(weight, block_shape=(4, 4)), right)


@pytest.mark.parametrize("seed", range(12))
def test_few_vectors_of_a_trained_matrix_are_followed(seed: int) -> None:
    """Where r is small, little lies between the wanted vectors and the random ones at the end of the block: their small
    Ritz values say nothing of what is missing. Taken for the bound, they gave 0.05 off at an estimate of 0.004.
    """
    rows, columns, rank = 192, 320, 16
    weight = matrix("trained-like", rows, columns, rank, dtype=torch.bfloat16, seed=seed)
    k = rows * columns // 20
    settings = SelectionSettings(k, rank, "chebyshev")
    before = select_principal(weight, settings)
    weight = perturbed(weight, before.index, 0.1, seed=seed + 50)
    found = select_principal(weight, settings, before.subspace)
    assert_near(found, principal_indices(weight.double(), k=k, lra_rank=rank, solver="svd"))
