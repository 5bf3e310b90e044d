"""Algorithm 1 of the paper, plainly: dense masks, dense moments, one process.

Nothing here is fast or shared with the rest of the package; everything else is tested against it.

    every T steps:   W' = U_r S_r V_rᵀ;  mask = the k largest entries of |W'|
                     moments of entries that left the mask are forgotten
    every step:      g = mask * dL/dW;   AdamW on the entries inside the mask
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lift_ds.config import LiftConfig


def principal_mask(weight: Tensor, k: int, lra_rank: int) -> Tensor:
    """The mask of the principal weights: the k largest entries of the rank-r approximation.

    Args:
        weight: [m, n].
        k: how many entries.
        lra_rank: r.

    Returns:
        bool [m, n] with k True entries; of equal entries the earlier one in row-major order is taken.
    """
    w = weight.detach().float()
    if lra_rank < min(w.shape):
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        w = (u[:, :lra_rank] * s[:lra_rank]) @ vh[:lra_rank]
    order = w.abs().flatten().sort(descending=True, stable=True).indices
    mask = torch.zeros(w.numel(), dtype=torch.bool)
    mask[order[:k]] = True
    return mask.view(w.shape)


class ReferenceLift:
    """LIFT with AdamW on a dictionary of dense weights.

    Args:
        weights: name -> [m, n] leaf tensors that require grad; trained in place.
        config: budget, rank, interval and Adam's settings; `solver` is not read, the SVD is the definition.
    """

    def __init__(self, weights: Mapping[str, Tensor], config: LiftConfig) -> None:
        self.weights = dict(weights)
        self.config = config
        self.steps = 0
        self.exp_avg = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.exp_avg_sq = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.masks = self._select()

    def _select(self) -> dict[str, Tensor]:
        return {
            name: principal_mask(w, self.config.entries(*w.shape), self.config.lra_rank)
            for name, w in self.weights.items()
        }

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
        if self.steps % self.config.refresh_interval == 0:
            self._refresh()

    def _refresh(self) -> None:
        old = self.masks
        self.masks = self._select()
        for name in self.weights:
            survives = old[name] & self.masks[name]
            self.exp_avg[name].mul_(survives)
            self.exp_avg_sq[name].mul_(survives)
