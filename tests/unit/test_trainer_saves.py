"""The Trainer's checkpoints in one process: an old one is deleted only after the new one is committed, and nobody sees
another `save_total_limit` than the user's meanwhile.

A kill between the Trainer's save and the commit leaves the folders as `Between` finds them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.trainer
from cases import small_llama, token_batch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

import lift_ds
from lift_ds.checkpoint import fault_of, newest

CONFIG = lift_ds.LiftConfig(budget_rank=2, lra_rank=2)


class Between(TrainerCallback):
    """Looks when the Trainer has saved, before or after LiftCallback has committed."""

    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, bool], int]] = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folders = sorted(Path(args.output_dir).glob("checkpoint-*"))
        self.seen.append(({folder.name: fault_of(folder) is None for folder in folders}, args.save_total_limit))


def trainer_in(folder: Path, *callbacks: TrainerCallback, **arguments: Any) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for step in range(3) for row in token_batch(step)]
    settings = {
        "max_steps": 3,
        "save_steps": 1,
        "save_total_limit": 1,
        "report_to": "none",
        "use_cpu": True,
        **arguments,
    }
    args = TrainingArguments(str(folder), save_strategy="steps", disable_tqdm=True, **settings)
    model = lift_ds.attach(small_llama(), CONFIG)
    optimizer = (lift_ds.LiftAdamW, {"model": model, "lr": 1e-3})
    trainer = Trainer(model, args, train_dataset=rows, optimizer_cls_and_kwargs=optimizer)
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Between, Between]:
    folder, before, after = tmp_path_factory.mktemp("saves"), Between(), Between()
    trainer_in(folder, before, lift_ds.LiftCallback(), after).train()
    return folder, before, after


def test_the_old_checkpoint_stays_until_the_new_one_is_committed(seen: tuple[Path, Between, Between]) -> None:
    _, before, after = seen
    assert [folders for folders, _ in before.seen] == [
        {"checkpoint-1": False},
        {"checkpoint-1": True, "checkpoint-2": False},
        {"checkpoint-2": True, "checkpoint-3": False},
    ]
    assert [folders for folders, _ in after.seen] == [{f"checkpoint-{step}": True} for step in (1, 2, 3)]


def test_the_limit_of_the_user_is_seen_everywhere(seen: tuple[Path, Between, Between]) -> None:
    folder, before, after = seen
    assert {limit for _, limit in before.seen + after.seen} == {1}
    assert torch.load(folder / "checkpoint-3" / "training_args.bin", weights_only=False).save_total_limit == 1


def test_the_trainer_deletes_by_itself_again_afterwards(seen: tuple[Path, Between, Between]) -> None:
    assert transformers.trainer.rotate_checkpoints is rotate_checkpoints


def test_a_training_that_failed_leaves_other_folders_to_the_trainer(tmp_path: Path) -> None:
    class Failing(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        trainer_in(tmp_path / "failed", lift_ds.LiftCallback(), Failing()).train()
    for step in (1, 2):
        (tmp_path / "other" / f"checkpoint-{step}").mkdir(parents=True)
    transformers.trainer.rotate_checkpoints(output_dir=str(tmp_path / "other"), save_total_limit=1)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["checkpoint-2"]
    trainer_in(tmp_path / "again", lift_ds.LiftCallback()).train()
    assert [path.name for path in (tmp_path / "again").glob("checkpoint-*")] == ["checkpoint-3"]
    assert transformers.trainer.rotate_checkpoints is rotate_checkpoints


def test_a_checkpoint_that_is_saved_over_is_not_whole_meanwhile(tmp_path: Path) -> None:
    trainer_in(tmp_path, lift_ds.LiftCallback(), max_steps=1).train()
    before = Between()
    trainer_in(tmp_path, before, lift_ds.LiftCallback(), max_steps=1).train()
    assert [folders for folders, _ in before.seen] == [{"checkpoint-1": False}]
    assert newest([tmp_path / "checkpoint-1"]).taken == "checkpoint-1"
