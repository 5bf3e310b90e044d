"""Pins the Trainer without DeepSpeed: what it saves is a plain model, and a training goes on from it to the bit, with
float32 values under bfloat16 weights too; what a refresh did is in its logs, where TensorBoard shows it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import small_llama, token_batch
from helpers import layers_of, same_bits
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import lift_ds
from lift_ds.checkpoint import principal

CONFIG = lift_ds.LiftConfig(budget_rank=2, lra_rank=2, refresh_interval=3, solver="chebyshev", selection_tolerance=0.3)
STEPS = 8


def trainer_in(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    *,
    own_adamw: bool = False,
    resume: Path | None = None,
    config: lift_ds.LiftConfig = CONFIG,
    **arguments: Any,
) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for step in range(STEPS) for row in token_batch(step)]
    settings = {"max_steps": STEPS, "save_steps": 1, "logging_steps": 1, "report_to": "none", "learning_rate": 1e-3}
    settings |= {
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "use_cpu": True,
        "disable_tqdm": True,
        **arguments,
    }
    model = lift_ds.attach(small_llama(dtype), config)
    extra = {} if own_adamw else {"optimizer_cls_and_kwargs": (lift_ds.LiftAdamW, {"model": model, "lr": 1e-3})}
    trainer = Trainer(model, TrainingArguments(str(folder), **settings), train_dataset=rows, **extra)
    trainer.add_callback(lift_ds.LiftCallback(resume_from_checkpoint=resume))
    return trainer


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[torch.dtype, Path, Trainer]:
    folder = tmp_path_factory.mktemp("trained")
    trainer = trainer_in(folder, request.param)
    trainer.train()
    return request.param, folder, trainer


def test_a_checkpoint_has_the_keys_of_the_plain_model(trained: tuple[torch.dtype, Path, Trainer]) -> None:
    """28 more before; θ and I are in a file of their own."""
    _, folder, _ = trained
    checkpoint = folder / "checkpoint-2"
    assert set(load_file(checkpoint / "model.safetensors")) == set(small_llama().state_dict())
    assert len(load_file(checkpoint / principal.FILE)) == 28


def test_a_saved_model_loads_anywhere(trained: tuple[torch.dtype, Path, Trainer], tmp_path: Path) -> None:
    dtype, _, trainer = trained
    trainer.save_model(str(tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).state_dict()
    found = weights_of(trainer.model)
    assert all(same_bits(loaded[name], found[name]) for name in loaded)


@pytest.mark.parametrize("cut", [2, 3, 4])
def test_resuming_continues_to_the_bit(trained: tuple[torch.dtype, Path, Trainer], cut: int, tmp_path: Path) -> None:
    """Just before a refresh, just after it, and later."""
    dtype, folder, before = trained
    checkpoint = folder / f"checkpoint-{cut}"
    again = trainer_in(tmp_path, dtype, resume=checkpoint)
    again.train(resume_from_checkpoint=str(checkpoint))
    check_same(again, before)


def check_same(found: Trainer, expected: Trainer) -> None:
    """The same weights, values and indices, to the bit."""
    state = weights_of(found.model)
    assert all(same_bits(state[name], value) for name, value in weights_of(expected.model).items())


def test_the_trainers_own_adamw_resumes_too(tmp_path: Path) -> None:
    """There the callback alone knows of LIFT."""
    whole = trainer_in(tmp_path / "whole", own_adamw=True)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    again = trainer_in(tmp_path / "again", own_adamw=True, resume=checkpoint)
    again.train(resume_from_checkpoint=str(checkpoint))
    check_same(again, whole)


def test_the_weights_before_training_are_in_a_checkpoint(tmp_path: Path) -> None:
    """Though what it saves as the model are the trained ones."""
    config = dataclasses.replace(CONFIG, keep_base=True, track_changes=True)
    trainer_in(tmp_path / "whole", config=config, save_steps=5, max_steps=5).train()
    checkpoint = tmp_path / "whole" / "checkpoint-5"
    again = trainer_in(tmp_path / "again", config=config, resume=checkpoint)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert {change.name for change in lift_ds.changed_entries(again.model, 2)} == {
        weight.full_name for weight in layers_of(again.model).values()
    }
    with lift_ds.base_weights(again.model):
        found = weights_of(again.model)
        assert all(same_bits(found[name], value) for name, value in small_llama().state_dict().items())


def test_a_checkpoint_of_other_weights_than_its_optimizers_is_refused(tmp_path: Path) -> None:
    """Read as it is, it would let a refresh spread the mistake."""
    trainer_in(tmp_path, max_steps=2).train()
    checkpoint = tmp_path / "checkpoint-2"
    again = trainer_in(tmp_path, resume=checkpoint)
    restore = principal.restore

    def restore_and_change(model: Any, directory: Any) -> None:
        restore(model, directory)
        layers_of(model)["model.layers.1.mlp.up_proj"].principal_values.data[3:6] += 1.0

    principal.restore = restore_and_change
    try:
        with pytest.raises(
            RuntimeError, match=r"in 1 of 14 matrices or stacks, .*model\.layers\.1\.mlp\.up_proj \(at 3 of"
        ):
            again.train(resume_from_checkpoint=str(checkpoint))
    finally:
        principal.restore = restore


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    events = EventAccumulator(str(folder)).Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("parts", [1, 3])
def test_tensorboard_shows_what_refreshes_did(parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each one, though the Trainer was to log every fifth step alone; a refresh in parts when it is whole."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = trainer_in(tmp_path, report_to="tensorboard", logging_steps=5, save_strategy="no")
    lift_ds.detach(trainer.model)
    lift_ds.attach(trainer.model, dataclasses.replace(CONFIG, refresh_parts=parts))
    trainer.train()
    (callback,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, lift_ds.LiftCallback))
    found = scalars(tmp_path / "events")
    steps = [3, 6] if parts == 1 else [5, 8]
    assert [report.step for report in callback.refreshes] == steps
    assert callback.refreshes == lift_ds.refreshes(trainer.model)
    for report in callback.refreshes:
        assert found["train/lift_churn"][report.step] == pytest.approx(report.churn)
        assert (
            found["train/lift_entries"][report.step]
            == report.entries
            == sum(layer.entries() for layer in layers_of(trainer.model).values())
        )
        assert found["train/lift_estimate"][report.step] == pytest.approx(report.estimate)
        assert found["train/lift_refresh_seconds"][report.step] == pytest.approx(report.seconds)
    assert set(found["train/lift_churn"]) == set(steps)
    assert set(found["train/loss"]) == {*steps, 5}
    history = {entry["step"]: entry for entry in trainer.state.log_history if "lift_churn" in entry}
    assert set(history) == set(steps)


def test_a_trainer_that_logs_nothing_is_left_alone(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, logging_strategy="no", save_strategy="no")
    trainer.train()
    assert not any("lift_churn" in entry or "loss" in entry for entry in trainer.state.log_history)


def test_other_trainers_in_the_process_log_their_own(tmp_path: Path) -> None:
    """The Trainer's method is replaced for as long as one of LIFT trains, and is its own again afterwards."""
    own = Trainer.log
    trainer_in(tmp_path, save_strategy="no").train()
    assert Trainer.log is own
    plain = Trainer(
        small_llama(),
        TrainingArguments(str(tmp_path / "plain"), max_steps=3, logging_steps=1, report_to="none", use_cpu=True),
        train_dataset=[{"input_ids": row, "labels": row} for row in token_batch(0)],
    )
    plain.train()
    assert not any("lift_churn" in entry for entry in plain.state.log_history)
