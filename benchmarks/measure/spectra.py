"""Matrices whose singular values are known, for tests and benchmarks of the low-rank solvers: seeded, at any size.

    name                      singular values of [m, n], s = min(m, n)             selection at rank r
    power 0.2 ... power 1.0   i^-alpha; trained weights have 0.2 to 0.6            determined, the slower the harder
    gaussian                  a flat bulk, those beside r almost equal             determined, just
    rank below r, above r     exactly r/2, or 2r, of them are not zero             determined
    clusters                  equal values in groups of r/2, a drop at r           determined
    cut cluster               equal values from 3r/4 to 5r/4                       not determined: any of them may be W'
    trained-like              Gaussian bulk, a power law above it, outlier rows    determined
                              and columns, as language models have
    one dominates             the first a million times the next, then i^-0.4      determined

Singular vectors are random, of the QR decomposition of tall Gaussian matrices, so the cost is that of two of those.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: The power law of a trained-like matrix ends there, in the bulk: large ones are cheap to make.
_TRAINED_COMPONENTS = 512


@dataclass(frozen=True)
class Spectrum:
    """One kind of matrix.

    Attributes:
        make: (rows, columns, rank, generator, device) -> float32 [rows, columns].
        determined: whether the exact selection at that rank is a single one.
    """

    make: Callable[[int, int, int, torch.Generator, torch.device], Tensor]
    determined: bool = True


def matrix(
    name: str,
    rows: int,
    columns: int,
    rank: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Make a matrix of a named kind.

    Args:
        name: one of `SPECTRA`.
        rows: m.
        columns: n.
        rank: r, at which some kinds have their cut; at most half of the smaller side.
        seed: of the random numbers, which are drawn on the CPU whatever the device.
        dtype: of the result; it is made in float32 and rounded.
        device: of the result.

    Returns:
        [rows, columns], scaled to entries of the size of initial weights (root mean square 0.02).
    """
    assert 2 * rank <= min(rows, columns), f"rank={rank} of a {rows} x {columns} matrix"
    made = SPECTRA[name].make(rows, columns, rank, torch.Generator().manual_seed(seed), torch.device(device))
    return made.mul_(0.02 / made.square().mean().sqrt()).to(dtype)


def with_singular_values(
    values: Tensor, rows: int, columns: int, generator: torch.Generator, device: torch.device
) -> Tensor:
    """Make a matrix with given singular values and random singular vectors.

    Args:
        values: float32 [s], s <= min(rows, columns); those beyond are zero.
        rows: m.
        columns: n.
        generator: of random numbers on the CPU.
        device: of the result.

    Returns:
        float32 [rows, columns].
    """
    left, right = (_orthonormal(side, values.numel(), generator, device) for side in (rows, columns))
    return (left * values.to(device)) @ right.T


def perturbed(weight: Tensor, index: Tensor, size: float, *, seed: int = 1) -> Tensor:
    """Return what a matrix is after its principal weights were trained for a while.

    Args:
        weight: [m, n], left as it is.
        index: int64 [k], the entries that were trained.
        size: standard deviation of the changes, in root mean squares of the matrix.
        seed: of the changes.
    """
    noise = torch.randn(index.numel(), generator=torch.Generator().manual_seed(seed)).to(weight.device)
    after = weight.float().clone()
    after.view(-1)[index] += noise * size * after.square().mean().sqrt()
    return after.to(weight.dtype)


def _orthonormal(rows: int, columns: int, generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator).to(device)).Q


def _numbers(count: int) -> Tensor:
    return torch.arange(1, count + 1, dtype=torch.float32)


def _of_values(values: Callable[[int, int], Tensor]) -> Callable[..., Tensor]:
    """Turn (smaller side, rank) -> singular values into what makes the matrix."""

    def make(rows: int, columns: int, rank: int, generator: torch.Generator, device: torch.device) -> Tensor:
        return with_singular_values(values(min(rows, columns), rank), rows, columns, generator, device)

    return make


def _power(alpha: float) -> Spectrum:
    return Spectrum(_of_values(lambda side, rank: _numbers(side) ** -alpha))


def _gaussian(rows: int, columns: int, rank: int, generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.randn(rows, columns, generator=generator).to(device)


def _clusters(side: int, rank: int) -> Tensor:
    """Groups of r/2 equal values, each 0.7 of the one before: r lies between the second and the third."""
    group = max(1, rank // 2)
    return 0.7 ** torch.div(_numbers(side) - 1, group, rounding_mode="floor").clamp(max=30)


def _cut_cluster(side: int, rank: int) -> Tensor:
    values = _numbers(side) ** -0.4
    low, high = 3 * rank // 4, 5 * rank // 4
    values[low:high] = values[low:high].mean()
    return values


def _one_dominates(side: int, rank: int) -> Tensor:
    values = _numbers(side) ** -0.4
    values[0] = 1e6
    return values


def _trained_like(rows: int, columns: int, rank: int, generator: torch.Generator, device: torch.device) -> Tensor:
    side = min(rows, columns)
    made = _gaussian(rows, columns, rank, generator, device).div_(rows**0.5 + columns**0.5)  # bulk below 1
    values = 6 * _numbers(min(side, _TRAINED_COMPONENTS)) ** -0.6
    made += with_singular_values(values, rows, columns, generator, device)
    made[torch.randperm(rows, generator=generator)[: max(1, rows // 200)]] *= 4
    made[:, torch.randperm(columns, generator=generator)[: max(1, columns // 400)]] *= 8
    return made


SPECTRA: dict[str, Spectrum] = {
    **{f"power {alpha}": _power(alpha) for alpha in (0.2, 0.4, 0.6, 0.8, 1.0)},
    "gaussian": Spectrum(_gaussian),
    "rank below r": Spectrum(_of_values(lambda side, rank: _numbers(max(1, rank // 2)) ** -0.4)),
    "rank above r": Spectrum(_of_values(lambda side, rank: _numbers(2 * rank) ** -0.4)),
    "clusters": Spectrum(_of_values(_clusters)),
    "cut cluster": Spectrum(_of_values(_cut_cluster), determined=False),
    "trained-like": Spectrum(_trained_like),
    "one dominates": Spectrum(_of_values(_one_dominates)),
}
