"""WatchedSaves: what a Trainer does after a step (logging, saving) under the watch of `lift_ds.watch`."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lift_ds import watch


class WatchedSaves(TrainerCallback):
    """Notes the communication of a Trainer between steps: the loss gathered for the log, and a checkpoint.

    A Trainer announces what it will do in its control flags, and afterwards that it has. An evaluation is not noted,
    apart from its forwards: what it computes may be the user's own, and take any time.
    """

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        _note_next(state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _note_next(state, control)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        _note_next(state, control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        _note_next(state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        watch.end()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        watch.end()


def _note_next(state: TrainerState, control: TrainerControl) -> None:
    if control.should_log:
        watch.begin(f"gathering the loss after step {state.global_step}")
    elif control.should_save and not control.should_evaluate:
        watch.begin(f"saving the checkpoint of step {state.global_step}")
    else:
        watch.end()
