"""Algorithm 1 of the paper, plainly: dense masks, dense moments, one process.

Nothing here is fast or shared with the rest of the package; everything else is tested against it.

    every T steps:   W' = U_r S_r V_rᵀ;  mask = the k largest entries of |W'|, or its blocks with the largest sums
                     moments of entries that left the mask are forgotten
    every step:      g = mask * dL/dW;   AdamW on the entries inside the mask
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from lift_ds.config import LiftConfig


def criterion_scores(
    weight: Tensor, criterion: str, lra_rank: int, seed: int = 0, name: str = "", gradient: Tensor | None = None
) -> Tensor:
    """The scores of all entries by a criterion; the largest are selected.

    Args:
        weight: [m, n].
        criterion: principal, magnitude, smallest, random or gradient.
        lra_rank: r.
        seed: of the criterion random.
        name: dotted name of the layer, by which that one tells matrices apart.
        gradient: [m, n], mean |dL/dW|, for the criterion gradient.

    Returns:
        [m, n].
    """
    w = weight.detach() if weight.dtype == torch.float64 else weight.detach().float()
    if criterion == "random":
        key = zlib.crc32(f"{seed} {name}".encode())
        rows = [_mixed(row ^ key) for row in range(w.shape[0])]
        return torch.tensor([[float(_mixed(row ^ column) >> 8) for column in range(w.shape[1])] for row in rows])
    if criterion == "gradient":
        assert gradient is not None, "measured by the caller"
        return gradient
    if criterion != "magnitude" and lra_rank < min(w.shape):
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        w = (u[:, :lra_rank] * s[:lra_rank]) @ vh[:lra_rank]
    return -w.abs() if criterion == "smallest" else w.abs()


def _mixed(number: int) -> int:
    """The finalizer of MurmurHash3, on an unsigned number of 32 bits."""
    number = (number ^ number >> 16) * 0x85EBCA6B % 2**32
    number = (number ^ number >> 13) * 0xC2B2AE35 % 2**32
    return number ^ number >> 16


def largest_mask(scores: Tensor, k: int, block_shape: tuple[int, int] = (1, 1)) -> Tensor:
    """The mask of the k largest scores, or of the blocks with the largest sums.

    Args:
        scores: [m, n].
        k: how many entries.
        block_shape: (p, q), where blocks of entries are ranked by the sum of their scores.

    Returns:
        bool [m, n] with k True entries; of equal entries or blocks the earlier one in row-major order is taken.
    """
    (m, n), (p, q) = scores.shape, block_shape
    sums = scores.reshape(m // p, p, n // q, q).sum((1, 3))
    order = sums.flatten().sort(descending=True, stable=True).indices
    mask = torch.zeros(sums.numel(), dtype=torch.bool)
    mask[order[: k // (p * q)]] = True
    return mask.view(sums.shape).repeat_interleave(p, dim=0).repeat_interleave(q, dim=1)


def principal_mask(weight: Tensor, k: int, lra_rank: int, block_shape: tuple[int, int] = (1, 1)) -> Tensor:
    """The mask of the principal weights: the k largest entries of the rank-r approximation.

    Args:
        weight: [m, n].
        k: how many entries.
        lra_rank: r.
        block_shape: (p, q), where blocks of entries are ranked by the sum of their magnitudes.

    Returns:
        bool [m, n] with k True entries; of equal entries or blocks the earlier one in row-major order is taken.
    """
    return largest_mask(criterion_scores(weight, "principal", lra_rank), k, block_shape)


class ReferenceLift:
    """LIFT with AdamW on a dictionary of dense weights.

    Args:
        weights: name -> [m, n] leaf tensors that require grad; trained in place.
        config: budget, rank, blocks, schedule and Adam's settings; `solver` is not read, the SVD is the definition.
        gradients: measures mean |dL/dW| of all weights as they are, for the criterion gradient.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        config: LiftConfig,
        gradients: Callable[[], Mapping[str, Tensor]] = dict,
    ) -> None:
        self.weights = dict(weights)
        self.gradients = gradients
        self.config = config
        self.steps = 0
        self.exp_avg = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.exp_avg_sq = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.masks = self._select(self.weights)

    def _select(self, names: Iterable[str]) -> dict[str, Tensor]:
        gradients = self.gradients() if self.config.criterion == "gradient" else {}
        return {name: self._mask(name, gradients.get(name)) for name in names}

    def _mask(self, name: str, gradient: Tensor | None) -> Tensor:
        w, config = self.weights[name], self.config
        scores = criterion_scores(w, config.criterion, config.lra_rank, config.seed, name, gradient)
        return largest_mask(scores, config.entries(*w.shape), config.block_shape)

    def indices(self) -> dict[str, Tensor]:
        """Return name -> flat positions inside the mask, int64, ascending."""
        return {name: mask.flatten().nonzero().squeeze(1) for name, mask in self.masks.items()}

    @torch.no_grad()
    def step(self, lr: float | None = None) -> None:
        """One AdamW step on the masked gradients, then a refresh when it is due; clears the gradients.

        Args:
            lr: learning rate of this step; None takes the config's.
        """
        lr = self.config.lr if lr is None else lr
        beta1, beta2 = self.config.betas
        self.steps += 1
        for name, w in self.weights.items():
            assert w.grad is not None, f"{name} has no gradient"
            mask = self.masks[name]
            g = torch.where(mask, w.grad, 0.0)
            m, v = self.exp_avg[name], self.exp_avg_sq[name]
            m.copy_(beta1 * m + (1 - beta1) * g)
            v.copy_(beta2 * v + (1 - beta2) * g * g)
            m_hat = m / (1 - beta1**self.steps)
            v_hat = v / (1 - beta2**self.steps)
            trained = (1 - lr * self.config.weight_decay) * w - lr * m_hat / (v_hat.sqrt() + self.config.eps)
            w.copy_(torch.where(mask, trained, w))
            w.grad = None
        due = self._due()
        for name, mask in (self._select(due) if due else {}).items():
            survives = self.masks[name] & mask
            self.exp_avg[name].mul_(survives)
            self.exp_avg_sq[name].mul_(survives)
            self.masks[name] = mask

    def _due(self) -> list[str]:
        """The matrices whose turn it is: part i of P is T i / P steps behind part 0."""
        interval, names = self.config.refresh_interval, list(self.weights)
        parts = min(self.config.refresh_parts, len(names))
        if self.steps < interval:
            return []
        return [
            name
            for part in range(parts)
            if self.steps % interval == interval * part // parts
            for name in names[len(names) * part // parts : len(names) * (part + 1) // parts]
        ]
