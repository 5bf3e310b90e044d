"""The reference against an independent formula, and the package against the reference.

`ReferenceLift` is what everything else is tested against, so it is itself compared with LIFT written once more without
torch: selection by numpy's SVD and Python's sort, AdamW entry by entry over a dict, the gradient of a least-squares
loss by hand. Then LiftAdamW in plain PyTorch has to follow the reference through three refreshes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cases import PARITY, PARITY_BLOCKS, PARITY_SOLVERS, PARITY_STEPS, build, loss_of, managed_weights
from helpers import layers_of, numpy_low_rank, sorted_selection
from torch import Tensor

import lift_ds
from lift_ds import LiftConfig
from lift_ds.reference import ReferenceLift, principal_mask

Array = np.ndarray[Any, Any]


class LiftByHand:
    """Algorithm 1 on one float64 matrix; the state of an entry is [exp_avg, exp_avg_sq], under its position."""

    def __init__(self, weight: Array, k: int, config: LiftConfig) -> None:
        self.w = weight.copy()
        self.k = k
        self.config = config
        self.steps = 0
        self.state = {position: [0.0, 0.0] for position in self.select()}

    def select(self) -> list[int]:
        return sorted_selection(numpy_low_rank(torch.from_numpy(self.w), self.config.lra_rank), self.k)

    def step(self, gradient: Array) -> None:
        self.steps += 1
        (b1, b2), lr, decay = self.config.betas, self.config.lr, self.config.weight_decay
        flat, gradient = self.w.reshape(-1), gradient.reshape(-1)
        for position, moments in self.state.items():
            g = gradient[position]
            moments[0] = b1 * moments[0] + (1 - b1) * g
            moments[1] = b2 * moments[1] + (1 - b2) * g**2
            first, second = moments[0] / (1 - b1**self.steps), moments[1] / (1 - b2**self.steps)
            flat[position] -= lr * decay * flat[position]
            flat[position] -= lr * first / (second**0.5 + self.config.eps)
        if self.steps % self.config.refresh_interval == 0:
            self.state = {position: self.state.get(position, [0.0, 0.0]) for position in self.select()}


#: Steps large enough that refreshes really replace entries; a learning rate and decay that show in every step.
BY_HAND = LiftConfig(
    density=0.2, lra_rank=3, refresh_interval=4, lr=0.03, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.5
)


@pytest.mark.parametrize("shape", [(14, 9), (9, 14), (11, 11), (3, 8)], ids=["tall", "wide", "square", "full rank"])
def test_reference_is_lift_written_by_hand(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(7)
    start = rng.standard_normal(shape)
    by_hand = LiftByHand(start, round(0.2 * shape[0] * shape[1]), BY_HAND)
    weight = torch.from_numpy(start.copy()).requires_grad_()
    reference = ReferenceLift({"w": weight}, BY_HAND)
    selections = {tuple(sorted(by_hand.state))}
    for _ in range(12):
        # |W x - y|^2 / 2 with new data each step; its gradient is (W x - y) x^T.
        x, y = rng.standard_normal((shape[1], 5)), 3 * rng.standard_normal((shape[0], 5))
        (0.5 * (weight @ torch.from_numpy(x) - torch.from_numpy(y)).square().sum()).backward()
        by_hand.step((by_hand.w @ x - y) @ x.T)
        reference.step()

        selections.add(tuple(sorted(by_hand.state)))
        assert reference.indices()["w"].tolist() == sorted(by_hand.state)
        # Both in float64 (1e-16): twelve steps of about ten operations leave less than 1e-13, Adam's division by a
        # second moment near zero magnifies it a little.
        np.testing.assert_allclose(weight.detach().numpy(), by_hand.w, rtol=1e-11, atol=1e-12)
        for moments, dense in enumerate((reference.exp_avg["w"], reference.exp_avg_sq["w"])):
            expected = np.zeros(shape).reshape(-1)
            for position, state in by_hand.state.items():
                expected[position] = state[moments]
            np.testing.assert_allclose(dense.numpy().reshape(-1), expected, rtol=1e-11, atol=1e-12)
    assert len(selections) > 1, "no refresh replaced an entry: the test shows nothing of a refresh"
    changed = np.flatnonzero(weight.detach().numpy() != start)
    assert set(changed) <= {position for selection in selections for position in selection}


def test_reference_takes_the_blocks_with_the_largest_sums() -> None:
    weight = torch.arange(24.0).view(4, 6)
    weight[0, 0] = -100
    mask = principal_mask(weight, 12, 6, (2, 3))  # sums: 0 + 1 + 2 + 6 + 7 + 8 + 100, 39, 93, 111
    assert mask.int().tolist() == [[1, 1, 1, 0, 0, 0]] * 2 + [[0, 0, 0, 1, 1, 1]] * 2


@pytest.mark.parametrize(("rows", "columns", "rank"), [(20, 12, 3), (12, 20, 1), (9, 9, 9)])
def test_reference_mask_is_the_selection_of_numpy(rows: int, columns: int, rank: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))
    mask = principal_mask(weight, 25, rank)
    assert mask.flatten().nonzero().flatten().tolist() == sorted_selection(numpy_low_rank(weight, rank), 25)


def test_reference_takes_the_learning_rate_of_the_step() -> None:
    weight = torch.ones(4, 4).requires_grad_()
    reference = ReferenceLift({"w": weight}, LiftConfig(density=1.0, lr=1.0))
    weight.sum().backward()
    reference.step(lr=0.25)
    # The first step of Adam is the learning rate, up to eps = 1e-8 and float32's 6e-8.
    torch.testing.assert_close(weight.detach(), torch.full((4, 4), 0.75), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", PARITY),
        ("matrices", PARITY),
        ("llama", PARITY_SOLVERS["gram"]),
        ("llama", PARITY_SOLVERS["chebyshev"]),
        ("matrices", PARITY_BLOCKS),
        ("llama", replace(PARITY_BLOCKS, refresh_parts=20)),  # as many parts as matrices: one at a time
    ],
    ids=["llama", "matrices", "gram", "chebyshev", "blocks", "one by one"],
)
def test_lift_adamw_follows_the_reference(kind: str, settings: LiftConfig) -> None:
    # In float32 the other solvers differ from the SVD in an entry of thousands, which lies at the threshold to 1e-7.
    dtype = torch.float32 if settings.solver == "svd" else torch.float64
    plain = build(kind, dtype)
    for parameter in plain.parameters():
        parameter.requires_grad_(False)
    weights = {name: weight.requires_grad_() for name, weight in managed_weights(plain, kind).items()}
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    reference = ReferenceLift(weights, settings)

    model = lift_ds.attach(build(kind, dtype), settings)
    optimizer = lift_ds.LiftAdamW(
        model, lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
    )
    layers = layers_of(model)
    assert layers.keys() == weights.keys()

    def assert_same_selection(step: int) -> None:
        for name, index in reference.indices().items():
            assert torch.equal(layers[name].principal_index.long(), index), f"{name} after step {step}"

    first = reference.indices()
    assert_same_selection(0)
    for step in range(PARITY_STEPS):
        expected, actual = loss_of(plain, kind, step), loss_of(model, kind, step)
        # The same float32 formulas in another order of operations (torch's fused AdamW, k values instead of a dense
        # matrix): 6e-8 a step, which training does not magnify here.
        assert actual.item() == pytest.approx(expected.item(), rel=1e-6)
        expected.backward()
        actual.backward()
        reference.step()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % settings.refresh_interval == 0 or settings.refresh_parts > 1:
            assert_same_selection(step + 1)

    for name, weight in weights.items():
        difference = layers[name].weight.detach() - weight.detach()
        assert difference.norm() <= 1e-6 * weight.norm(), name
        # What training did is far above that tolerance: an optimizer that does nothing would not pass.
        assert (weight.detach() - start[name]).norm() > 1e-3 * weight.norm(), name
    assert any(not torch.equal(index, first[name]) for name, index in reference.indices().items()), "no churn"
    assert optimizer.driver is not None
    assert not any(report.fell_back for report in optimizer.driver.reports), "another solver was used than is tested"


def test_parity_depends_on_what_a_refresh_carries_over() -> None:
    """The run above would notice moments that a refresh dropped: the trajectories part by far more than 1e-6."""
    finals = []
    for forget in (False, True):
        model = lift_ds.attach(build("matrices"), PARITY)
        optimizer = lift_ds.LiftAdamW(model, lr=PARITY.lr, weight_decay=PARITY.weight_decay)
        for step in range(25):
            loss_of(model, "matrices", step).backward()
            optimizer.step()
            optimizer.zero_grad()
            if forget and step == 19:
                _forget(optimizer)
        finals.append(model.get_submodule("tall").weight.detach().clone())
    assert (finals[0] - finals[1]).norm() > 1e-5 * finals[0].norm()


def _forget(optimizer: torch.optim.Optimizer) -> None:
    for moments in optimizer.state.values():
        for key in ("exp_avg", "exp_avg_sq"):
            tensor: Tensor = moments[key]
            tensor.zero_()
