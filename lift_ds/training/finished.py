"""A training that resumes at its end: transformers' Trainer would take one step more before it looks."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lift_ds.logs import get_logger

logger = get_logger()


class _NothingLeft(Exception):  # no error: the only way out of the Trainer before its first step
    pass


class _StopBeforeStep(TrainerCallback):
    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= state.max_steps:
            raise _NothingLeft


def train_what_is_left(trainer: Trainer, checkpoint: str | None) -> None:
    """Train from a checkpoint to the end; where it was saved at the end, load it and no more.

    Args:
        trainer: set up.
        checkpoint: a checkpoint folder, or None to start anew.
    """
    trainer.add_callback(_StopBeforeStep())
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except _NothingLeft:
        logger.info("%s was saved at the end of the training: no step is left", checkpoint)
        trainer.control = trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
