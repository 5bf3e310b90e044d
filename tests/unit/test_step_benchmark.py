"""Pins down that benchmarks/step.py compares like with like: LIFT and masks change the same entries of the same weights
to the same bits, the published masks change no others; LoRA is given as many numbers to train; and that a budget can be
exceeded.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import step
from benchmarks.measure import optimizer_phase
from benchmarks.measure.models import matrix_shapes
from benchmarks.measure.training_step import Case

SHAPES = [(24, 40), (16, 8)]


def after_phases(method: str, dtype: torch.dtype) -> tuple[optimizer_phase.Matrices, list[torch.Tensor]]:
    """Two phases of one method on fresh matrices; returns them and the weights there were."""
    matrices = optimizer_phase.Matrices(SHAPES, 0.1, dtype, "cpu")
    before = [weight.clone() for weight in matrices.weights]
    for _ in range(2):
        matrices.run(method)
    return matrices, before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lift_and_masks_do_the_same(dtype: torch.dtype) -> None:
    lift, before = after_phases("lift", dtype)
    masks, _ = after_phases("masks", dtype)
    for which, weight in enumerate(lift.weights):
        assert torch.equal(weight, masks.weights[which])
        changed = weight != before[which]
        assert changed.any()
        assert not changed[~lift.masks[which]].any()


def test_the_published_masks_change_no_other_entries() -> None:
    matrices, before = after_phases("published", torch.float32)
    for weight, old, mask in zip(matrices.weights, before, matrices.masks, strict=True):
        assert torch.equal(weight != old, mask)


def test_lora_trains_as_many_numbers() -> None:
    case = Case("lora", "cpu", 2, 0.05, 512, 1408, 4, 2048, 1, 256, False, 1)
    shapes = matrix_shapes(case.hidden, case.intermediate)
    lora = case.lora_rank() * sum(m + n for m, n in shapes)
    assert lora == pytest.approx(0.05 * sum(m * n for m, n in shapes), rel=0.02)


def test_each_budget_can_be_exceeded() -> None:
    phase = {"name": "", "dtype": "", "lift_against": {"dense": 1.0, "published": 0.1}}
    training = {"ranks": 2, "lift_against": {"full": 1.0}}
    assert all(entry["pass"] for entry in step.budgets([phase], training))
    for record, key in [(phase, "dense"), (phase, "published"), (training, "full")]:
        record["lift_against"][key] += 0.01
        assert sum(not entry["pass"] for entry in step.budgets([phase], training)) == 1
        record["lift_against"][key] -= 0.01
