"""Algorithm 1 of the paper, plainly: dense masks, dense moments, one process.

Nothing here is fast or shared with the rest of the package; everything else is tested against it.

    every T steps:   W' = U_r S_r V_rᵀ;  mask = the k largest entries of |W'|, or its blocks with the largest sums
                     moments of entries that left the mask are forgotten
    every step:      g = mask * dL/dW;   AdamW on the entries inside the mask
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lift_ds.config import LiftConfig


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
    w = weight.detach() if weight.dtype == torch.float64 else weight.detach().float()
    if lra_rank < min(w.shape):
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        w = (u[:, :lra_rank] * s[:lra_rank]) @ vh[:lra_rank]
    (m, n), (p, q) = w.shape, block_shape
    scores = w.abs().reshape(m // p, p, n // q, q).sum((1, 3))
    order = scores.flatten().sort(descending=True, stable=True).indices
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[order[: k // (p * q)]] = True
    return mask.view(scores.shape).repeat_interleave(p, dim=0).repeat_interleave(q, dim=1)


class ReferenceLift:
    """LIFT with AdamW on a dictionary of dense weights.

    Args:
        weights: name -> [m, n] leaf tensors that require grad; trained in place.
        config: budget, rank, blocks, schedule and Adam's settings; `solver` is not read, the SVD is the definition.
    """

    def __init__(self, weights: Mapping[str, Tensor], config: LiftConfig) -> None:
        self.weights = dict(weights)
        self.config = config
        self.steps = 0
        self.exp_avg = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.exp_avg_sq = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.masks = {name: self._select(w) for name, w in self.weights.items()}

    def _select(self, w: Tensor) -> Tensor:
        return principal_mask(w, self.config.entries(*w.shape), self.config.lra_rank, self.config.block_shape)

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
        for name in self._due():
            self._refresh(name)

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

    def _refresh(self, name: str) -> None:
        old, self.masks[name] = self.masks[name], self._select(self.weights[name])
        survives = old & self.masks[name]
        self.exp_avg[name].mul_(survives)
        self.exp_avg_sq[name].mul_(survives)
