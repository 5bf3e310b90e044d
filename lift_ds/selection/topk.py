"""The k largest entries of a matrix, with ties broken by position.

Sizes that depend on the scores have to be read back, and a device is idle until they are. On the host that costs
nothing, and to leave most scores out early saves most of the work. On a device all sizes are known beforehand here.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Scores that are looked at, on the host, to bound the threshold from below before all are computed.
SAMPLE_SCORES = 2**18


def on_host(device: torch.device) -> bool:
    """Tell whether sizes can be read without waiting; this is the only place that chooses how to rank."""
    return device.type == "cpu"


def kth_largest(scores: Tensor, k: int) -> Tensor:
    """Return the k-th largest of scores as a tensor []; nothing is read back.

    Args:
        scores: any shape; no NaN.
        k: 1 <= k <= scores.numel().
    """
    flat = scores.reshape(-1)
    if on_host(flat.device):
        return flat.kthvalue(flat.numel() - k + 1).values
    # On CUDA one block computes a kthvalue, and deterministic mode refuses it.
    return torch.topk(flat, k, sorted=False).values.amin()


def top_k_positions(scores: Tensor, k: int) -> Tensor:
    """Positions of the k *largest* scores; nothing is read back.

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
    taken, ties = flat > threshold, flat == threshold
    missing = k - taken.count_nonzero()
    taken |= ties & (ties.cumsum(0, dtype=torch.int32) <= missing)  # the first of the ties
    return torch.nonzero_static(taken, size=k).squeeze(1)


class RunningTopK:
    """The k largest of scores that come piece by piece; the same as `top_k_positions` of all of them together.

    Holds at most 2 k candidates and those of one piece. A candidate is dropped once k others are larger, or as large
    and earlier.

    Args:
        k: how many, at least 1.
        device: where the scores are.
        floor: a score, as a tensor; what does not lie above it is taken for none of the k largest. On the host alone:
            there it, and later the k-th largest so far, keeps most scores from ever being candidates.
    """

    def __init__(self, k: int, device: torch.device, floor: Tensor | None = None) -> None:
        assert floor is None or on_host(device), "how many scores lie above a floor is read back for each piece"
        self._k = k
        self._scores: list[Tensor] = []
        self._positions: list[Tensor] = []
        self._held = 0
        self._seen = 0
        self._threshold = floor
        self._device = device

    def add(self, scores: Tensor) -> None:
        """Take the next piece; any shape, no NaN; it must not be changed afterwards."""
        flat = scores.reshape(-1)
        if self._threshold is None:
            positions = torch.arange(flat.numel(), dtype=torch.int32, device=self._device)
        else:
            positions = torch.nonzero(flat > self._threshold).squeeze(1).int()
            flat = flat[positions]
        self._scores.append(flat)
        self._positions.append(positions + self._seen)
        self._held += flat.numel()
        self._seen += scores.numel()
        if self._held > 2 * self._k:
            self._reduce()

    def positions(self) -> Tensor | None:
        """Return the flat positions of the k largest, int64 [k], ascending; None if fewer lie above the floor."""
        if self._held < self._k:
            return None
        if self._held > self._k:
            self._reduce()
        return torch.cat(self._positions).long()

    def _reduce(self) -> None:
        scores, positions = torch.cat(self._scores), torch.cat(self._positions)
        self._scores, self._positions = [], []
        best = top_k_positions(scores, self._k)  # candidates are in the order of their positions, so ties are right
        scores = scores[best]
        self._scores, self._positions, self._held = [scores], [positions[best]], self._k
        if on_host(self._device):
            self._threshold = scores.amin()
