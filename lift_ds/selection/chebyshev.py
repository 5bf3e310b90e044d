"""W' of a large matrix by Chebyshev-filtered subspace iteration: products of G = W Wᵀ with a block of vectors.

One round:

    Rayleigh-Ritz    the best eigenvectors of G within the subspace, and their residuals
    estimate         how much of the selection may still differ; stop when that is little enough
    deflate          vectors that are exact enough leave G and the block
    filter           a Chebyshev polynomial of G that is small on [0, λ_b], where nothing is wanted, and grows above
    orthonormalise   before the largest eigenvalue takes over all columns in float32

The degree of the filter follows from the growth that is needed, and ends where rounding would be amplified too much.
After Zhou, Saad, Tiago and Chelikowsky, "Self-consistent-field calculations using Chebyshev-filtered subspace
iteration" (2006).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lift_ds.selection.deviation import Deviation, column_sample, deviation, deviation_per_error
from lift_ds.selection.low_rank import Factors, outer_gram, projected
from lift_ds.selection.precision import unit_scale, working_precision

#: The block has half as many columns again as are wanted: the farther λ_b is below λ_r, the fewer products.
_OVERSAMPLING = 0.5
_LEAST_OVERSAMPLING = 8
#: Columns of a subspace from earlier that are replaced by random ones: a direction that has become principal since, and
#: to which the old ones are orthogonal, would not be found otherwise. Half of those beyond r at most.
_FRESH_COLUMNS = 8
#: By which such a direction, among the r wanted, is amplified in them at least before the estimate is believed: the
#: residuals of an invariant subspace vanish, whichever vectors it lacks.
_LEAST_GROWTH = 100.0
#: The deviation is estimated as it is on average; this many times it is reported, and compared with the tolerance.
_SAFETY = 2.0
_MAX_ROUNDS, _MAX_DEGREE = 12, 12
#: How much more the filter may amplify the largest eigenvalue than the r-th, with 7 digits to lose.
_MAX_SPREAD = 1e5
#: A vector leaves the block when it causes this share of the allowed squared error, divided by r; and only then if λ_1
#: is so far from λ_r, and so many vectors go at once, that it pays.
_DEFLATED_ERROR, _DEFLATION_SPREAD, _LEAST_DEFLATED = 0.01, 3.0, 4
#: Without progress by this factor in two rounds, rounding is the limit.
_PROGRESS = 0.7


@dataclass(frozen=True)
class Filtered:
    """What a filtered subspace iteration found.

    Args:
        factors: W' as [m, r] and [r, n]; None where the tolerance was not reached.
        subspace: [min(m, n), b] float16 on the host, to start from next time.
        estimate: share of k that may differ from the exact selection.
        rounds: Rayleigh-Ritz steps.
        products: of G with a block.
    """

    factors: Factors | None
    subspace: Tensor
    estimate: float
    rounds: int
    products: int


def chebyshev(
    weight: Tensor, rank: int, *, k: int, tolerance: float, start: Tensor | None = None, seed: int = 0
) -> Filtered:
    """Approximate W' until the selection is right up to a share of k.

    Args:
        weight: [m, n], any floating dtype; worked through in tiles, so that no float32 copy of it is made.
        rank: r, below min(m, n).
        k: entries that will be selected.
        tolerance: share of k that may differ from the exact selection, by the estimate.
        start: subspace of an earlier call for this matrix, or None; one of another shape is not used.
        seed: of the random columns.
    """
    if weight.shape[0] > weight.shape[1]:
        found = chebyshev(weight.T, rank, k=k, tolerance=tolerance, start=start, seed=seed)
        factors = None if found.factors is None else (found.factors[1].T, found.factors[0].T)
        return Filtered(factors, found.subspace, found.estimate, found.rounds, found.products)
    scale = unit_scale(weight)
    sample = working_precision(column_sample(weight)) * scale
    iteration = _Iteration(outer_gram(weight, scale), rank, start, seed)
    estimates: list[float] = []
    while True:
        iteration.rayleigh_ritz()
        per_error = deviation_per_error(sample, iteration.basis(), k / weight.numel(), weight.numel())
        remaining = iteration.deviation(per_error)
        estimates.append(_SAFETY * remaining.share)
        untried = iteration.warm and len(estimates) == 1
        if (estimates[-1] <= tolerance and not untried) or _is_stuck(estimates):
            break
        iteration.deflate(remaining, (tolerance / per_error) ** 2)
        iteration.filter(growth=max(2 * estimates[-1] / tolerance, _LEAST_GROWTH if untried else 1.0))
    factors = projected(weight, iteration.basis()) if estimates[-1] <= tolerance else None
    return Filtered(factors, iteration.subspace(), estimates[-1], len(estimates), iteration.products)


def _is_stuck(estimates: list[float]) -> bool:
    if len(estimates) == _MAX_ROUNDS or not math.isfinite(estimates[-1]):
        return True
    return len(estimates) > 4 and estimates[-1] > _PROGRESS * estimates[-3]


class _Iteration:
    """The block of vectors, those that were deflated before it, and what is left of G.

    Args:
        gram: G [s, s], changed in place.
        rank: r.
        start: an earlier subspace or None.
        seed: of random columns.

    Attributes:
        products: of G with a block so far.
        warm: whether the earlier subspace could be used.
    """

    def __init__(self, gram: Tensor, rank: int, start: Tensor | None, seed: int) -> None:
        self._gram = gram
        self._rank = rank
        self.products = 0
        self._done = _Ritz(gram[:, :0], gram[0, :0], gram[:, :0])
        side = gram.shape[0]
        width = min(side, rank + max(_LEAST_OVERSAMPLING, math.ceil(_OVERSAMPLING * rank)))
        self._kept = width - min(_FRESH_COLUMNS, (width - rank) // 2)
        # Drawn on the host in float32, so that a seed means the same on every device and with every default dtype.
        generator = torch.Generator("cpu").manual_seed(seed)
        random = torch.randn(side, width, generator=generator, dtype=torch.float32, device="cpu").to(gram)
        self.warm = start is not None and start.shape == (side, self._kept)
        if start is not None and self.warm:
            random[:, : start.shape[1]] = start.to(gram)
            self._block = _orthonormal(random)
        else:
            self._block = _orthonormal(self._multiply(random))

    def rayleigh_ritz(self) -> None:
        """Rotate the block to the Ritz vectors of G, largest value first."""
        image = self._multiply(self._block)
        projected_gram = self._block.T @ image
        values, rotation = torch.linalg.eigh((projected_gram + projected_gram.T) / 2)
        rotation = rotation.flip(1)
        self._block, self._image, values = self._block @ rotation, image @ rotation, values.flip(0)
        self._ritz = _Ritz(self._block, values, self._image - self._block * values)
        self._levels = values.tolist()

    def basis(self) -> Tensor:
        """Return the r leading vectors found so far, [s, r]."""
        return self._all().vectors[:, : self._rank]

    def subspace(self) -> Tensor:
        """Return what to start from next time, float16 on the host."""
        return self._all().vectors[:, : self._kept].to("cpu", torch.float16)

    def deviation(self, per_error: float) -> Deviation:
        """Estimate what is still wrong with the basis."""
        everything = self._all()
        return deviation(everything.values, everything.residuals, self._rank, per_error)

    def deflate(self, remaining: Deviation, allowed: float) -> None:
        """Take the leading vectors that are exact enough out of the block and out of G.

        Args:
            remaining: the present deviation.
            allowed: squared error of W' at which the iteration may stop.
        """
        done = self._done.values.numel()
        if self._levels[0] <= _DEFLATION_SPREAD * self._wanted():
            return
        exact = remaining.energies[done:] <= _DEFLATED_ERROR * allowed / self._rank
        count = min(int(exact.long().cumprod(0).sum()), self._rank - 1 - done)  # the leading run
        if count < _LEAST_DEFLATED:
            return
        gone, self._ritz = self._ritz.split(count)
        self._gram.addmm_(gone.vectors * gone.values, gone.vectors.T, alpha=-1)
        self._done = self._done.followed_by(gone)
        self._block, self._image = self._block[:, count:], self._image[:, count:]
        self._levels = self._levels[count:]

    def filter(self, growth: float) -> None:
        """Amplify what is wanted in the block against the rest, and orthonormalise.

        Args:
            growth: of the wanted against the unwanted that would be enough.
        """
        top, last = self._levels[0], self._levels[-1]
        if top <= 0:  # W is zero
            return
        cut = max(last, torch.finfo(self._gram.dtype).eps * top)
        degree = _degree(top, self._wanted(), cut, growth)
        block = self._filtered(degree, cut, top)
        if self._done.values.numel():
            for _ in range(2):  # once leaves what rounding makes of it
                block = _orthonormal(block - self._done.vectors @ (self._done.vectors.T @ block))
        self._block = _orthonormal(block)

    def _filtered(self, degree: int, cut: float, top: float) -> Tensor:
        """The polynomial T_d((2 G - cut) / cut) / T_d((2 top - cut) / cut) of G, applied to the block."""
        half = cut / 2
        first = half / (top - half)
        sigma = first
        previous, current = self._block, (self._image - half * self._block) * (first / half)
        for _ in range(degree - 1):
            following_sigma = 1 / (2 / first - sigma)
            following = self._multiply(current).sub_(current, alpha=half).mul_(2 * following_sigma / half)
            following.sub_(previous, alpha=sigma * following_sigma)
            previous, current, sigma = current, following, following_sigma
        return current

    def _multiply(self, block: Tensor) -> Tensor:
        self.products += 1
        return self._gram @ block

    def _wanted(self) -> float:
        """Return λ_r."""
        return self._levels[self._rank - 1 - self._done.values.numel()]

    def _all(self) -> _Ritz:
        return self._done.followed_by(self._ritz)


@dataclass(frozen=True)
class _Ritz:
    """Vectors [s, c], their values [c], descending, and residuals [s, c]."""

    vectors: Tensor
    values: Tensor
    residuals: Tensor

    def followed_by(self, other: _Ritz) -> _Ritz:
        return _Ritz(
            torch.cat([self.vectors, other.vectors], dim=1),
            torch.cat([self.values, other.values]),
            torch.cat([self.residuals, other.residuals], dim=1),
        )

    def split(self, count: int) -> tuple[_Ritz, _Ritz]:
        return (
            _Ritz(self.vectors[:, :count], self.values[:count], self.residuals[:, :count]),
            _Ritz(self.vectors[:, count:], self.values[count:], self.residuals[:, count:]),
        )


def _degree(top: float, wanted: float, cut: float, growth: float) -> int:
    """Choose the least degree that grows enough between `cut` and `wanted`, within what float32 stands."""
    rate_top, rate_wanted = (math.acosh(max(2 * value / cut - 1, 1.0001)) for value in (top, wanted))
    enough = math.ceil(math.log(2 * max(growth, 1.0)) / rate_wanted)
    spread = rate_top - rate_wanted
    stable = math.floor(math.log(_MAX_SPREAD) / spread) if spread > 0 else _MAX_DEGREE
    return max(2, min(enough, stable, _MAX_DEGREE))


def _orthonormal(block: Tensor) -> Tensor:
    """Orthonormalise columns by two Cholesky factorisations, or by QR where they are too dependent."""
    block = block / block.norm(dim=0).clamp_min(torch.finfo(block.dtype).tiny)
    once, failed = _by_cholesky(block)
    twice, failed_again = _by_cholesky(once)
    for tried, dependent in zip((block, once), torch.stack([failed, failed_again]).tolist(), strict=True):
        if dependent:
            return torch.linalg.qr(tried).Q
    return twice


def _by_cholesky(block: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormalise columns about; with whether that failed, as a tensor []."""
    triangle, failed = torch.linalg.cholesky_ex(block.T @ block)
    return torch.linalg.solve_triangular(triangle.T, block, upper=True, left=False), failed
