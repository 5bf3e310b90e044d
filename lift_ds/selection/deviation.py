"""How much of a selection may differ from the exact one, estimated from the residuals of approximate eigenvectors.

    u_1 ... u_b, λ_1 >= ... >= λ_b    Ritz vectors and values of G = W Wᵀ in a subspace of b > r dimensions
    residuals  R = G U - U Λ          what G moves out of that subspace, orthogonal to it

The exact leading eigenvectors lie outside of span(u_1 ... u_r) for two reasons: directions that the subspace does not
have (first order in R), and Ritz vectors i <= r that ought to mix with j > r (second order: both couple to the same
missing directions). Eliminating the missing directions at the energy λ_i, with about λ_b as the bound of what G does
there, gives the angles; each moves energy of W' (λ = σ²), and all together ‖error of W'‖². Spread evenly over the
entries of W', that moves as many of them across the threshold as there are close to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lift_ds.selection.topk import kth_largest

#: Width of the neighbourhood of the threshold in which entries are counted, as a share of it.
_NEIGHBOURHOOD = 0.05
#: Columns of W' that are formed to count them.
_SAMPLED_COLUMNS = 128
#: Vectors at the end of the block that tell how large an eigenvalue outside may be.
_LAST = 8
_TINY = 1e-30


@dataclass(frozen=True)
class Deviation:
    """The error of an approximation and what it does to the selection.

    Args:
        share: of k; entries selected that the exact selection does not have, about.
        energies: [r], the part of the squared error that each vector causes by the directions that are missing.
    """

    share: float
    energies: Tensor


def deviation(values: Tensor, residuals: Tensor, rank: int, per_error: float) -> Deviation:
    """Estimate the error of W' = U_r U_rᵀ W and its effect.

    Args:
        values: Ritz values [b] of W Wᵀ, descending, b > r.
        residuals: R [s, b].
        rank: r.
        per_error: what `deviation_per_error` says.
    """
    # Rounding of the products looks like residuals of this size.
    noise = torch.finfo(values.dtype).eps / 2 * values[0].abs()
    sizes = residuals.norm(dim=0)  # [b]
    # Of what lies outside at least as much as the last vectors point to; their own Ritz values are too small.
    bound = (values + sizes)[-min(_LAST, values.numel() - rank) :].amax()
    wanted, others = values[:rank, None], values[None, rank:]
    distance = (wanted - bound).clamp_min(_TINY)  # [r, 1]
    coupling = (residuals[:, :rank].T @ residuals[:, rank:]) / distance  # [r, b - r]
    mixing = (torch.hypot(coupling, noise) / (wanted - others).clamp_min(_TINY)).clamp_max(1.0)
    missing = (torch.hypot(sizes[:rank], noise) / distance[:, 0]).clamp_max(1.0)  # [r]
    energies = missing**2 * (wanted[:, 0] + bound).clamp_min(0.0)
    squared = float(energies.sum() + (mixing**2 * (wanted + others).clamp_min(0.0)).sum())
    return Deviation(per_error * math.sqrt(squared) if squared else 0.0, energies)


def column_sample(weight: Tensor) -> Tensor:
    """Return some columns of a matrix [s, l], evenly spaced."""
    return weight[:, :: max(1, weight.shape[1] // _SAMPLED_COLUMNS)]


def deviation_per_error(sample: Tensor, basis: Tensor, share: float, entries: int) -> float:
    """Return which share of the selection changes sides per unit of ‖error of W'‖.

    Normally distributed errors of standard deviation e move f e / √(2π) entries across the threshold each way, f being
    the entries per unit of magnitude there.

    Args:
        sample: columns of W in working precision, for all of them; in the unit of the error.
        basis: U_r [s, r].
        share: k / (s l).
        entries: s l.
    """
    magnitudes = (basis @ (basis.T @ sample)).abs().flatten()
    smaller = max(1, round(magnitudes.numel() * (1 - share)))
    threshold = kth_largest(magnitudes, magnitudes.numel() - smaller + 1)
    near = ((magnitudes - threshold).abs() < _NEIGHBOURHOOD * threshold).sum() / magnitudes.numel()
    per_unit = float(near / (2 * _NEIGHBOURHOOD * threshold))  # of all entries; inf or NaN where the threshold is zero
    if not math.isfinite(per_unit):
        return math.inf
    return per_unit / share / math.sqrt(2 * math.pi * entries)
