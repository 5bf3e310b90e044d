"""What several unit tests need: comparison to the bit, a plain training loop, a selection in numpy, both rankings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import loss_of
from torch import Tensor, nn

from lift_ds.model.attachment import require_attachment
from lift_ds.model.weights import PrincipalWeight
from lift_ds.optimizer import LiftAdamW
from lift_ds.selection import select, topk


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns of a floating tensor, so that 0.0 differs from -0.0 and NaN equals itself."""
    whole_numbers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    tensor = tensor.detach().contiguous()
    return tensor.view(whole_numbers[tensor.element_size()]) if tensor.is_floating_point() else tensor


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def changed_positions(before: Tensor, after: Tensor) -> set[int]:
    """Flat positions whose bits differ."""
    return set((bits(before) != bits(after)).flatten().nonzero().flatten().tolist())


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def layers_of(model: nn.Module) -> dict[str, PrincipalWeight]:
    return require_attachment(model).weights


def index_sets(model: nn.Module) -> dict[str, set[int]]:
    return {name: set(layer.principal_index.tolist()) for name, layer in layers_of(model).items()}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, kind: str, steps: range) -> list[float]:
    """Plain steps of a model of `cases`; returns the losses."""
    losses = []
    for step in steps:
        loss = loss_of(model, kind, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def applied_steps(optimizer: LiftAdamW) -> int:
    assert optimizer.driver is not None
    return optimizer.driver.applied_steps


def rank_as(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let selections rank as on the "host", or as on a "device", wherever they are."""
    for module in (topk, select):
        monkeypatch.setattr(module, "on_host", lambda device: form == "host")


def numpy_low_rank(weight: Tensor, rank: int) -> np.ndarray[Any, Any]:
    """W' in float64 by numpy, [m, n]; W itself where the rank is not below its smaller side."""
    w = weight.detach().double().numpy()
    if rank >= min(w.shape):
        return w
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    return sum(s[i] * np.outer(u[:, i], vt[i]) for i in range(rank))


def sorted_selection(scores: np.ndarray[Any, Any], k: int) -> list[int]:
    """Positions of the k largest |scores|, the earlier of equals first, by Python's sort; ascending."""
    flat = [abs(float(x)) for x in scores.reshape(-1)]
    return sorted(sorted(range(len(flat)), key=lambda p: (-flat[p], p))[:k])


def random_matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Normally distributed entries [rows, columns], the same for the same seed."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
