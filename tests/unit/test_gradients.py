"""Pins down the criterion "gradient": what is measured is mean |dL/dW|, with no more memory than the gradient of one
layer; training that selects by it follows the reference; measuring leaves no trace; and what would not be right is
refused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cases
import pytest
import torch
from torch import Tensor, nn

import lift_ds
from benchmarks.measure.counting import allocated_peak
from lift_ds.model.attachment import require_attachment
from lift_ds.model.gradients import groups_of
from lift_ds.reference import ReferenceLift
from lift_ds.refresh import gradients

CONFIG = replace(cases.PARITY, criterion="gradient", refresh_interval=3)
BATCHES = cases.gradient_batches()


def trained_model(config: lift_ds.LiftConfig = CONFIG) -> tuple[nn.Module, lift_ds.LiftAdamW]:
    model = lift_ds.attach(cases.build("llama"), config)
    return model, lift_ds.LiftAdamW(model, lr=config.lr, weight_decay=config.weight_decay)


def test_training_follows_the_reference() -> None:
    """Seven steps, two refreshes. Tolerance as of the parity runs: float32 sums in another order."""
    plain = cases.build("llama").requires_grad_(False)
    weights = cases.managed_weights(plain, "llama")
    for weight in weights.values():
        weight.requires_grad_(True)
    reference = ReferenceLift(weights, CONFIG, lambda: cases.mean_gradients(plain, weights))
    model, optimizer = trained_model()
    layers = require_attachment(model).weights
    lift_ds.select_by_gradients(model, BATCHES)
    first = {name: layer.principal_index.long() for name, layer in layers.items()}
    assert all(torch.equal(first[name], index) for name, index in reference.indices().items())
    for step in range(7):
        cases.loss_of(plain, "llama", step).backward()
        reference.step()
        cases.loss_of(model, "llama", step).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, index in reference.indices().items():
            assert torch.equal(layers[name].principal_index.long(), index), (name, step)
            distance = (layers[name].weight - weights[name]).norm() / weights[name].norm()
            assert distance < 1e-6
    assert any(not torch.equal(layers[name].principal_index.long(), first[name]) for name in layers)
    assert [report.step for report in lift_ds.refreshes(model)] == [3, 6]


def test_measuring_takes_no_more_memory_than_one_gradient() -> None:
    model, _ = trained_model()
    attachment = require_attachment(model)
    largest = max(layer.weight.numel() for layer in attachment.weights.values())
    attachment.gradients = gradients.GradientMeter(model, BATCHES, gradients.own_loss, 0)
    values = [layer.principal_values for layer in attachment.weights.values()]
    attachment.gradients._totals = {}  # measures nothing

    def backward() -> None:
        torch.autograd.grad(model(**BATCHES[0]).loss, values)

    backward()
    alone = allocated_peak(backward)
    attachment.gradients._totals = None
    store = attachment.driver.store
    jobs, peaks, names = [list(attachment.weights)], [], set()
    for group in gradients.in_groups(jobs, attachment):
        names |= set(group[0])
        peaks.append(allocated_peak(lambda group=group: gradients.gradients_of(group[0], attachment, store)))  # type: ignore[misc]
    assert names == set(attachment.weights)
    assert len(peaks) > 4
    # The sums in float32, and the tile that backward forms.
    assert max(peaks) <= alone + 2 * 4 * largest


def test_a_bound_on_memory_makes_larger_groups() -> None:
    attachment = require_attachment(trained_model()[0])
    jobs = [list(attachment.weights), list(attachment.weights)[:3]]
    alone = gradients.in_groups(jobs, attachment)
    assert len(alone) > 4
    assert [len(of_rank) for of_rank in alone[-1]][1] == 0  # the second rank has done its own before
    roomy = replace(CONFIG, refresh_memory_gib=0.001)
    assert gradients.in_groups(jobs, require_attachment(trained_model(roomy)[0])) == [jobs]


def test_measuring_leaves_no_trace() -> None:
    model, _ = trained_model()
    attachment = require_attachment(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    attachment.gradients = gradients.GradientMeter(model, BATCHES, gradients.own_loss, 0)
    found = gradients.gradients_of(list(attachment.weights), attachment, attachment.driver.store)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not attachment.reached
    assert found.keys() == attachment.weights.keys()


def test_a_loss_of_your_own() -> None:
    model = lift_ds.attach(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)), replace(CONFIG, budget_rank=1))
    lift_ds.LiftAdamW(model)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    lift_ds.select_by_gradients(model, [{"x": x}], lambda model, batch: model(batch["x"])[:, 0].sum())
    # Of the last layer only the first row has a gradient.
    assert model[1].lift_weight.principal_index.tolist()[:6] == list(range(6))


@pytest.mark.parametrize(
    ("entries", "expected"),
    [([], []), ([5], [[5]]), ([5, 3, 2, 1], [[5], [3, 2], [1]]), ([9, 1], [[9], [1]]), ([1, 9, 1], [[1], [9], [1]])],
)
def test_groups_hold_as_much_as_one_layer(entries: list[int], expected: list[list[int]]) -> None:
    assert [entries[group] for group in groups_of(entries, 5)] == expected


def test_what_is_refused() -> None:
    model, _ = trained_model()
    with pytest.raises(RuntimeError, match=r"criterion='gradient' selects by gradients.*select_by_gradients"):
        cases.loss_of(model, "llama", 0)
    with torch.no_grad():
        model(**BATCHES[0])
    with pytest.raises(ValueError, match="no batches to measure"):
        lift_ds.select_by_gradients(model, [])
    with pytest.raises(ValueError, match="gives no loss"):
        lift_ds.select_by_gradients(model, [{"input_ids": BATCHES[0]["input_ids"]}])
    with pytest.raises(RuntimeError, match=r"selects by gradients"):  # still
        cases.loss_of(model, "llama", 0)
    other, _ = trained_model(cases.PARITY)
    with pytest.raises(ValueError, match="criterion='principal' does not look at gradients"):
        lift_ds.select_by_gradients(other, BATCHES)
    with pytest.raises(ValueError, match="no optimizer is built"):
        lift_ds.select_by_gradients(lift_ds.attach(cases.build("llama"), CONFIG), BATCHES)


def trained_by_trainer(folder: Any, steps: int, resume: bool = False) -> dict[str, Tensor]:
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": ids, "labels": ids} for step in range(6) for ids in cases.token_batch(step)]
    args = TrainingArguments(
        output_dir=str(folder), max_steps=steps, save_steps=4, per_device_train_batch_size=2, report_to="none",
        learning_rate=1e-3, lr_scheduler_type="constant", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    model = lift_ds.attach(cases.build("llama"), replace(CONFIG, gradient_batches=2), resume=resume)
    trainer = Trainer(
        model, args, train_dataset=rows, callbacks=[lift_ds.LiftCallback()],
        optimizer_cls_and_kwargs=(lift_ds.LiftAdamW, {"model": model, "lr": 1e-3}),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    assert len(require_attachment(model).gradients._batches) == 2
    assert [report.step for report in lift_ds.refreshes(model)] == ([6] if resume else [3, 6][: steps // 3])
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_trainer_gives_the_batches_and_a_resume_goes_on_to_the_bit(tmp_path: Any) -> None:
    whole = trained_by_trainer(tmp_path / "whole", 7)
    trained_by_trainer(tmp_path / "cut", 4)
    resumed = trained_by_trainer(tmp_path / "cut", 7, resume=True)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
