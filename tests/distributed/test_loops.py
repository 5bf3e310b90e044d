"""Pins down that LIFT trains the same weights in every loop: plain PyTorch, a hand-written DeepSpeed loop,
transformers' Trainer (ZeRO-2, ZeRO-3, DDP; LiftAdamW or its own AdamW) and TRL's SFTTrainer.

Two ranks against plain PyTorch on the whole batch; 1e-6 relative by norm: ranks add up gradients in another order.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import run_ranks

TOLERANCE = 1e-6
WITH_DEEPSPEED = ("deepspeed", "trainer-zero2", "trainer-zero3", "trainer-own-adamw", "trainer-groups", "sft-zero2")
WITHOUT = ("trainer-ddp", "trainer-ddp-instance")


@pytest.fixture(scope="module")
def loops(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with_deepspeed = run_ranks("loops", 2, tmp_path_factory.mktemp("deepspeed"), "plain", *WITH_DEEPSPEED)[0]
    return with_deepspeed | run_ranks("loops", 2, tmp_path_factory.mktemp("ddp"), *WITHOUT)[0]


@pytest.mark.parametrize("loop", [*WITH_DEEPSPEED, *WITHOUT])
def test_every_loop_trains_the_same_weights(loops: dict[str, Any], loop: str) -> None:
    weights, expected = loops[loop]["weights"], loops["plain"]["weights"]
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        assert ((weights[name] - weight).norm() / weight.norm()).item() < TOLERANCE, name


@pytest.mark.parametrize("loop", ["plain", *WITH_DEEPSPEED, *WITHOUT])
def test_every_loop_refreshes_at_the_same_steps(loops: dict[str, Any], loop: str) -> None:
    """For the Trainers these come from the log history, where LiftCallback reports them."""
    assert loops[loop]["refreshes"] == [5, 10]


def test_training_moved_the_weights(loops: dict[str, Any]) -> None:
    import cases

    start = dict(cases.build("llama").named_parameters())
    moved = sum(not torch.equal(start[name], weight) for name, weight in loops["plain"]["weights"].items())
    assert moved == 14 + 1  # the managed matrices and the final norm
