"""LiftCallback: LIFT inside the Hugging Face Trainer and what derives from it (TRL's SFTTrainer)."""

from __future__ import annotations

import os
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lift_ds import checkpoint
from lift_ds.attachment import require_attachment
from lift_ds.refresh import Driver
from lift_ds.saves import WatchedSaves
from lift_ds.zero.facade import bind


class LiftCallback(WatchedSaves):
    """Makes a Trainer train the principal weights of a model that `attach` has prepared.

    With DeepSpeed or without, with LiftAdamW or the Trainer's own AdamW (both hold the principal values as ordinary
    parameters): after every applied step the weights hold the trained values, and the selection is refreshed when due.
    The reports of the refreshes go into the Trainer's log history, a description of the run into each checkpoint.
    """

    def __init__(self) -> None:
        self._driver: Driver | None = None
        self._reported = 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        require_attachment(model)
        while isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        self._driver = bind(model, optimizer)
        # Reentrant checkpointing needs an input that requires grad, and the embeddings are frozen.
        if args.activation_checkpointing and hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self._driver is not None
        for report in self._driver.reports[self._reported :]:
            state.log_history.append(
                {"step": state.global_step, "lift_churn": report.churn, "lift_refresh_seconds": report.seconds}
            )
        self._reported = len(self._driver.reports)
        super().on_step_end(args, state, control)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero:
            directory = os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            checkpoint.describe(model, directory)
        super().on_save(args, state, control)
