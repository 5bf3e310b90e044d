"""LiftCallback: LIFT inside the Hugging Face Trainer and what derives from it (TRL's SFTTrainer)."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers.trainer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import deepspeed_config
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy

from lift_ds import checkpoint
from lift_ds.checkpoint import Layout, changes, principal, subspaces
from lift_ds.checkpoint.failed_save import WRITER_ERRORS, save_error
from lift_ds.config import LiftConfig
from lift_ds.model.attachment import require_attachment
from lift_ds.refresh.driver import Driver
from lift_ds.refresh.gradients import select_by_gradients
from lift_ds.refresh.report import RefreshReport
from lift_ds.runtime import watchdog
from lift_ds.runtime.ranks import by_main
from lift_ds.zero.bind import bind, without_accelerate
from lift_ds.zero.fragments import refuse_universal_by_wrong_links
from lift_ds.zero.nvme import remove_saved_states
from lift_ds.zero.options import refuse_options
from lift_ds.zero.plain_weights import replace_scripts
from lift_ds.zero.universal_files import restore


class _WatchedSaves(TrainerCallback):
    """Tells the watchdog what a Trainer communicates between steps: the loss for the log, and a checkpoint.

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
        watchdog.end()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        watchdog.end()


def _note_next(state: TrainerState, control: TrainerControl) -> None:
    if control.should_log:
        watchdog.begin(f"gathering the loss after step {state.global_step}")
    elif control.should_save and not control.should_evaluate:
        watchdog.begin(f"saving the checkpoint of step {state.global_step}")
    else:
        watchdog.end()


class LiftCallback(_WatchedSaves):
    """Makes a Trainer train the principal weights of a model that `attach` has prepared.

    With DeepSpeed or without, with LiftAdamW or the Trainer's own AdamW (both hold the principal values as ordinary
    parameters): after every applied step the weights hold the trained values, and the selection is refreshed when due.
    The Trainer logs after each refresh, with its figures (`lift_churn`, ...). Each checkpoint is committed when all
    ranks have written it, and only then are those deleted that `save_total_limit` has no room for. Saved models are
    plain ones.

    Args:
        resume_from_checkpoint: the folder that is given to `trainer.train`, where it is not the last one in
            `output_dir`; needed for a universal checkpoint, of which DeepSpeed loads a part.

    Raises:
        ValueError: the DeepSpeed configuration of the TrainingArguments has an option that LIFT does not support.
    """

    def __init__(self, resume_from_checkpoint: str | os.PathLike[str] | None = None) -> None:
        refuse_options(deepspeed_config() or {})
        self._driver: Driver | None = None
        self._reported = 0
        self._resumed = resume_from_checkpoint
        self._rotations = _HeldRotations()
        self._logs = _FiguresInLogs(self)

    @property
    def refreshes(self) -> list[RefreshReport]:
        """What the refreshes of this training did, oldest first."""
        return [] if self._driver is None else list(self._driver.refreshes)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        attachment = require_attachment(model)
        optimizer = without_accelerate(optimizer)
        refuse_options(_deepspeed_file(args))
        self._rotations.hold(str(args.output_dir))
        self._logs.hold()
        if state.global_step > 0:
            if self._resumed is None:
                refuse_half_a_universal(args)
            else:
                _finish_universal(model, optimizer, self._resumed)
        self._driver = bind(model, optimizer)
        self._reported = len(self._driver.refreshes)
        if state.global_step > 0:
            self._restore(model, self._resumed or _checkpoint(args, state))
            attachment.selected = True
        if attachment.needs_gradients and attachment.gradients is None:
            select_by_gradients(model, _first_batches(kwargs["train_dataloader"], attachment.config, model.device))
        attachment.require_selected()
        # Reentrant checkpointing needs an input that requires grad, and the embeddings are frozen.
        if args.activation_checkpointing and hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()

    def _restore(self, model: Any, directory: str | os.PathLike[str]) -> None:
        """Take from a checkpoint what neither the Trainer nor DeepSpeed has loaded, and check what they have."""
        assert self._driver is not None
        principal.restore(model, directory)
        subspaces.restore(model, directory)
        changes.restore(model, directory)
        self._driver.check_state()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for report in self.refreshes[self._reported :]:
            self._logs.add(_figures(report))
            control.should_log |= args.logging_strategy != IntervalStrategy.NO
        self._reported = len(self.refreshes)
        super().on_step_end(args, state, control)
        self._clear_the_way(args, state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_epoch_end(args, state, control)
        self._clear_the_way(args, state, control)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        directory = _checkpoint(args, state)
        try:
            by_main(lambda: _complete(model, directory, args))
            checkpoint.commit(model, directory, step=state.global_step, layout=layout_of(args))
        except (*WRITER_ERRORS, ValueError) as error:
            raise save_error(directory, error) from error
        self._rotations.run()
        super().on_save(args, state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._rotations.release()
        self._logs.release()
        super().on_train_end(args, state, control)

    def _clear_the_way(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """A folder that is about to be written into is no whole checkpoint any more."""
        if control.should_save:
            folder = _checkpoint(args, state)
            checkpoint.withdraw(folder)
            remove_saved_states(folder)


class _HeldRotations:
    """The Trainer's deletions of old checkpoints, held back until the new one is committed.

    The Trainer deletes at the end of its save, before it tells its callbacks; a process that is killed between the two
    would leave no whole checkpoint where `save_total_limit` is 1. What it calls for that is replaced while it trains.
    """

    def __init__(self) -> None:
        self._held: list[Callable[[], None]] = []

    def hold(self, output_dir: str) -> None:
        """From now on keep the deletions that are asked for in one folder."""
        rotate = _own_rotation()

        def keep(*args: Any, **kwargs: Any) -> None:
            asked = partial(rotate, *args, **kwargs)
            if kwargs.get("output_dir", args[0] if args else None) == output_dir:
                self._held.append(asked)
            else:
                asked()

        keep.holds_back = rotate  # type: ignore[attr-defined]
        transformers.trainer.rotate_checkpoints = keep

    def run(self) -> None:
        """Make the deletions that were kept."""
        while self._held:
            self._held.pop(0)()

    def release(self) -> None:
        """Leave deletions to the Trainer again."""
        transformers.trainer.rotate_checkpoints = _own_rotation()


def _own_rotation() -> Callable[..., None]:
    """Return what transformers calls by itself; a training that ended in an error has left it replaced."""
    rotate = transformers.trainer.rotate_checkpoints
    return getattr(rotate, "holds_back", rotate)


def layout_of(args: TrainingArguments) -> Layout:
    """Return how the states of a Trainer's run are shared out."""
    config = getattr(args, "hf_deepspeed_config", None)
    return Layout(args.world_size, config.get_value("zero_optimization.stage", 0)) if config else Layout(1, 0)


def _complete(model: Any, directory: Path, args: TrainingArguments) -> None:
    """Add what LIFT needs to go on from what a Trainer has saved, and let the rest give plain models."""
    if _deepspeed_file(args):
        replace_scripts(directory)
    else:
        principal.write(model, directory)


def _first_batches(loader: Any, config: LiftConfig, device: torch.device) -> list[dict[str, Any]]:
    """Return the first rows of a Trainer's data as batches of its size, the same ones on all ranks and after a resume.

    Not from the loader itself, which would lose its place.
    """
    size = loader.batch_size or 1
    rows = list(islice(loader.dataset, size * config.gradient_batches))
    batches = [loader.collate_fn(rows[start : start + size]) for start in range(0, len(rows), size)]
    return [
        {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        for batch in batches
    ]


def _deepspeed_file(args: TrainingArguments) -> dict[str, Any]:
    config = getattr(args, "hf_deepspeed_config", None)
    return config.config if config is not None else {}


def refuse_half_a_universal(args: TrainingArguments) -> None:
    """Refuse to go on from a universal checkpoint of which only DeepSpeed's part can have been loaded.

    Raises:
        ValueError: the DeepSpeed configuration asks for universal checkpoints.
    """
    if _deepspeed_file(args).get("checkpoint", {}).get("load_universal"):
        raise ValueError(
            '"load_universal": true, but LiftCallback does not know the checkpoint, of which DeepSpeed leaves out the '
            "weights and indices that LIFT trains: give LiftCallback(resume_from_checkpoint=...) the folder that "
            "trainer.train is given"
        )


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _finish_universal(model: Any, wrapper: Any, directory: str | os.PathLike[str]) -> None:
    """Load what DeepSpeed has left out of a universal checkpoint; of others it has loaded everything."""
    if by_main(lambda: checkpoint.read(directory)["universal"]):
        refuse_universal_by_wrong_links(wrapper)
        (states,) = Path(directory).glob("global_step*")
        restore(model, wrapper, states)


def _figures(report: RefreshReport) -> dict[str, float]:
    """Return what is logged of a refresh.

    `lift_estimate` is the share of the selection that may differ from the exact one, by the solver's own estimate.
    """
    return {
        "lift_churn": report.churn,
        "lift_entries": report.entries,
        "lift_estimate": report.estimate,
        "lift_refresh_seconds": report.seconds,
    }


class _FiguresInLogs:
    """Adds figures to what a Trainer logs next, before anything reports it.

    A callback cannot do so by itself: a Trainer does not tell its callbacks who it is, and those that report to
    TensorBoard or W&B come before the user's own. So `Trainer.log` is replaced while there is something to train.

    Args:
        callback: by which the Trainer is known.
    """

    def __init__(self, callback: TrainerCallback) -> None:
        self._callback = callback
        self._figures: dict[str, float] = {}

    def hold(self) -> None:
        """From now on what is added goes into the Trainer's logs."""
        _active.append(self)
        Trainer.log = _log_with_figures

    def add(self, figures: dict[str, float]) -> None:
        """Have figures logged with the next loss."""
        self._figures |= figures

    def release(self) -> None:
        """Leave the logs to the Trainer again."""
        _active[:] = [other for other in _active if other is not self]
        if not _active:
            Trainer.log = _plain_log

    def taken_for(self, trainer: Trainer) -> dict[str, float]:
        """Return what is to be logged by a Trainer, once."""
        if not any(callback is self._callback for callback in trainer.callback_handler.callbacks):
            return {}
        taken, self._figures = self._figures, {}
        return taken


_plain_log = Trainer.log
_active: list[_FiguresInLogs] = []


def _log_with_figures(trainer: Trainer, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
    if "loss" in logs:
        for active in _active:
            logs = {**logs, **active.taken_for(trainer)}
    _plain_log(trainer, logs, *args, **kwargs)
