"""Pins that ReferenceModel stands for a second copy of the model in TRL's trainers: the same losses over steps with
refreshes in between, without the memory of the copy, and in evaluation mode where the model trains with dropout.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import small_llama
from datasets import Dataset
from sentences import reward, sentences, tokenizer
from torch import nn
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

import lift_ds
from benchmarks.measure.counting import walk_storages
from lift_ds.model.attachment import require_attachment

CONFIG = lift_ds.LiftConfig(density=0.05, lra_rank=4, refresh_interval=3, solver="gram", keep_base=True)
STEPS = 8

SHARED: dict[str, Any] = {
    "learning_rate": 1e-2, "use_cpu": True, "max_steps": STEPS, "per_device_train_batch_size": 2, "logging_steps": 1,
    "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "bf16": False,
}  # fmt: skip


def losses_of(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained_by_dpo(folder: Path, *, own_copy: bool) -> tuple[DPOTrainer, int]:
    """A trainer after its steps, and the bytes it holds: of all tensors made since the call that are alive."""
    pairs = {"prompt": sentences(1, 4, 16), "chosen": sentences(2, 5, 16), "rejected": sentences(3, 5, 16)}
    before = walk_storages()  # held until the end, for the address of a freed one would be given to a new one
    model = small_llama(hidden_size=64, intermediate_size=160)
    reference = copy.deepcopy(model) if own_copy else None
    lift_ds.attach(model, replace(CONFIG, keep_base=not own_copy))
    trainer = DPOTrainer(
        model,
        ref_model=reference or lift_ds.ReferenceModel(model),
        args=DPOConfig(str(folder), **SHARED),
        train_dataset=Dataset.from_dict(pairs),
        processing_class=tokenizer(),
    )
    trainer.add_callback(lift_ds.LiftCallback())
    trainer.train()
    known = {storage._cdata for storage in before}
    return trainer, sum(storage.nbytes() for storage in walk_storages() if storage._cdata not in known)


def test_dpo_has_the_losses_of_a_separate_reference_and_not_its_memory(tmp_path: Path) -> None:
    """Losses start at log 2 and move, so the reference matters; the records hold a few percent of its bytes."""
    own, bytes_of_own = trained_by_dpo(tmp_path, own_copy=False)
    separate, bytes_of_separate = trained_by_dpo(tmp_path, own_copy=True)
    assert losses_of(own) == pytest.approx(losses_of(separate), abs=1e-6)
    assert len(losses_of(own)) == STEPS
    assert max(abs(loss - losses_of(own)[0]) for loss in losses_of(own)) > 1e-3
    driver = require_attachment(own.model).driver
    assert [report.step for report in driver.refreshes] == [3, 6]
    record = sum(one.index.words.nbytes + one.numbers.nbytes for one in driver.changes.base.values())
    whole = sum(parameter.nbytes for parameter in separate.ref_model.parameters())
    assert record < 0.2 * whole
    assert bytes_of_separate - bytes_of_own == pytest.approx(whole - record, rel=0.02)


def test_grpo_has_the_losses_of_the_reference_it_makes_by_itself(tmp_path: Path) -> None:
    """It makes none with beta=0; then it is given one."""
    small_llama(vocab_size=len(tokenizer())).save_pretrained(tmp_path / "model")
    found = []
    for own in (False, True):
        model = type(small_llama()).from_pretrained(tmp_path / "model")
        lift_ds.attach(model, CONFIG)
        args = GRPOConfig(str(tmp_path), beta=0.0 if own else 0.5, num_generations=2, max_completion_length=4, **SHARED)
        prompts = Dataset.from_dict({"prompt": sentences(1, 4, 8)})
        trainer = GRPOTrainer(model, reward, args=args, train_dataset=prompts, processing_class=tokenizer())
        if own:
            assert trainer.ref_model is None
            trainer.beta, trainer.ref_model = 0.5, lift_ds.ReferenceModel(model)
        trainer.add_callback(lift_ds.LiftCallback())
        trainer.train()
        found.append([(entry["loss"], entry["kl"]) for entry in trainer.state.log_history if "loss" in entry])
    assert found[1] == [pytest.approx(entry, abs=1e-6) for entry in found[0]]
    assert any(kl > 1e-6 for _, kl in found[0])


def test_it_runs_in_evaluation_mode_and_leaves_the_mode_alone() -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.drop, self.still = nn.Linear(16, 16), nn.Dropout(0.5), nn.Dropout(0.5).eval()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.still(self.drop(self.layer(x)))

    model = Dropped()
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    before = model.eval()(x).detach()
    model.train()
    model.still.eval()
    lift_ds.attach(model, CONFIG)
    optimizer, reference = lift_ds.LiftAdamW(model, lr=0.1), lift_ds.ReferenceModel(model)
    for _ in range(4):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        found = reference(x)
        assert torch.equal(found, before)
        assert not found.requires_grad
        assert (model.training, model.drop.training, model.still.training) == (True, True, False)
    assert not torch.equal(model.eval()(x), before)
    assert [*reference.modules()] == [reference], "whoever prepares it finds no layer of the model"
