"""Pins that the Trainers of transformers and TRL train by LIFT what Algorithm 1 trains in them: ten steps with two
refreshes on two ranks, without DeepSpeed and in ZeRO 2 and 3.

The reference is an optimizer in the same Trainer, over the dense weights of the same model, on the same ranks. Those
that take no class of an optimizer (DPO, KTO, GRPO, RLOO, Seq2Seq) train by their own AdamW. "Without a copy", the model
before training that DPO and KTO compare with is what LIFT has recorded of it; for the reference it is a copy there too.
1e-6 relative by norm: sums of float32 in another order, over ten steps; seen are 3e-8.
"""

from __future__ import annotations

from typing import Any

import pytest
from harness import run_ranks

pytestmark = pytest.mark.slow

KINDS = ("sft", "reward", "dpo", "dpo without a copy", "kto", "kto without a copy", "grpo", "rloo", "seq2seq")
WAYS = ("lift", "zero2", "zero3")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    without = run_ranks("trainers", 2, tmp_path_factory.mktemp("without"), "reference", "lift")[0]
    return without | run_ranks("trainers", 2, tmp_path_factory.mktemp("deepspeed"), "zero2", "zero3")[0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_trainer_trains_what_the_algorithm_does(runs: dict[str, Any], kind: str, way: str) -> None:
    found, expected = runs[f"{way} {kind}"], runs[f"reference {kind}"]
    assert found["refreshes"] == [4, 8]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5, abs=1e-5)  # logged with five digits or so
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        assert ((found["weights"][name] - weight).norm() / weight.norm()).item() < 1e-6, name


@pytest.mark.parametrize("kind", KINDS)
def test_something_was_trained(runs: dict[str, Any], kind: str) -> None:
    """All losses of RLOO are 0, as its advantages add up to 0; its gradients are not."""
    run = runs[f"reference {kind}"]
    assert len(run["losses"]) == 10
    matrices = {"seq2seq": 2 * 6 + 2 * 10, "reward": 14 + 1}.get(
        kind, 14
    )  # of T5's encoder and decoder; and a new head
    assert len(run["moved"]) == matrices
    if kind != "rloo":
        assert len({round(loss, 6) for loss in run["losses"]}) > 4
    if kind in ("grpo", "rloo"):
        assert len(set(run["rewards"])) > 4
