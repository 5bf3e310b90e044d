"""The k largest entries of a matrix, with ties broken by position."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k_positions(scores: Tensor, k: int) -> Tensor:
    """Positions of the k *largest* scores.

    Equal scores at the threshold are taken in order of position, so that the result is a function of the
    scores alone: `torch.topk` leaves the order of ties to the device and the thread count.

    Args:
        scores: any shape; no NaN.
        k: 1 <= k <= scores.numel().

    Returns:
        Flat row-major positions, int64 [k], ascending.
    """
    flat = scores.reshape(-1)
    assert 1 <= k <= flat.numel(), f"k={k} of {flat.numel()} entries"
    if k == flat.numel():
        return torch.arange(k, device=flat.device)
    threshold = torch.topk(flat, k, sorted=False).values.amin()
    above = torch.nonzero(flat > threshold).squeeze(1)
    ties = torch.nonzero(flat == threshold).squeeze(1)[: k - above.numel()]
    return torch.cat([above, ties]).sort().values
