"""Pins that LIFT trains the same with DeepSpeed's sequence parallelism: two ranks with half of each sequence, against
one process with all of it.

Losses may differ by the order of float32 sums over the tokens, which other ranks add up. In ZeRO-3 the indices may not.
In ZeRO-2 DeepSpeed makes every gradient as many times larger as ranks share a sequence. Adam divides that out, but
for its epsilon; entries whose scores are nearly equal may then change places.
"""

from __future__ import annotations

from typing import Any

import cases
import pytest
from harness import run_ranks
from workers.sequence_parallel import SETTINGS, STEPS

import lift_ds
from lift_ds.model.attachment import require_attachment

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """One process, whole sequences."""
    model = lift_ds.attach(cases.build("llama"), SETTINGS)
    optimizer = lift_ds.LiftAdamW(model, lr=SETTINGS.lr, weight_decay=SETTINGS.weight_decay)
    losses = []
    for step in range(STEPS):
        loss = cases.loss_of(model, "llama", step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    weights = require_attachment(model).weights
    return {"losses": losses, "indices": {name: one.principal_index.long() for name, one in weights.items()}}


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks("sequence_parallel", 2, tmp_path_factory.mktemp("halves"))


@pytest.mark.parametrize(("stage", "share"), [(2, 0.002), (3, 0.0)])
def test_halves_of_sequences_train_the_same(
    alone: dict[str, Any], halves: list[dict[str, Any]], stage: int, share: float
) -> None:
    for rank in halves:
        found = rank[f"stage {stage}"]
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        entries = {name: {*index.tolist()} for name, index in alone["indices"].items()}
        others = sum(len(index - {*found["indices"][name].tolist()}) for name, index in entries.items())
        assert others <= share * sum(map(len, entries.values()))


def test_gradients_sent_in_bfloat16_train_nearly_the_same(halves: list[dict[str, Any]]) -> None:
    """Adam's steps have the same size whatever a gradient is rounded to, and mostly the same direction."""
    for rank in halves:
        found, expected = rank["rounded messages"], rank["stage 3"]
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-3)
        assert found["losses"] != expected["losses"]
