"""TRL's trainer, as the shipped job uses it.

When a save fails, it fails on all ranks together and in one line. Rows longer than --max_length are reported. A run
that resumes at the end of its training takes no further step.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTTrainer

from lift_ds.checkpoint.failed_save import WRITER_ERRORS, SaveError, save_error, stop_together
from lift_ds.runtime.logs import get_logger
from lift_ds.training import lengths
from lift_ds.zero.engine_checkpoints import failures_kept

logger = get_logger()


class CheckedTrainer(SFTTrainer):
    """SFTTrainer whose `SaveError` names the checkpoint that could not be saved, the reason and the last whole one."""

    _failures: list[SaveError]
    #: Writes the card of a model into a folder; TRL's own knows nothing of how it was trained.
    write_card: Callable[[str], None]
    #: What the base's configuration has; the Trainer turns it off while it trains.
    use_cache: bool

    def __init__(self, **settings: Any) -> None:
        self._rows_used: dict[str, int] = {}  # "train", or the name of a set that is evaluated -> rows
        super().__init__(**settings)

    def rows_to_evaluate(self) -> int:
        """Return how many held-out rows are evaluated, without those that are too long to be used."""
        return sum(count for name, count in self._rows_used.items() if name != "train")

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Dataset:
        # Once for whole rows, which tokenizes them; then to cut and to pack these, which tokenizes no more.
        unlimited = lengths.without_limit(args)
        whole = super()._prepare_dataset(dataset, processing_class, unlimited, False, formatting_func, dataset_name)
        name = "training rows" if dataset_name == "train" else "held-out rows"
        fitting = lengths.fit(whole, args, packing, name)
        prepared = super()._prepare_dataset(fitting, processing_class, args, packing, None, dataset_name)
        self._rows_used[dataset_name] = len(fitting if packing else prepared)
        return prepared

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        if self.is_world_process_zero():
            self.write_card(str(self.args.output_dir))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        config: Any = self.model.config
        in_training, config.use_cache = config.use_cache, self.use_cache
        try:
            super()._save(output_dir, state_dict)
        finally:
            config.use_cache = in_training

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._failures = []
        with ExitStack() as stack:
            if self.is_deepspeed_enabled:
                self._failures = stack.enter_context(failures_kept(self.model_wrapped, folder))
            try:
                super()._save_checkpoint(model, trial)
            except SaveError:
                raise
            except WRITER_ERRORS as error:
                raise save_error(folder, error) from error

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # The last thing in a save that the ranks do together is in here: from there on a failure has to be told.
        self._save_and_tell(super()._save_optimizer_and_scheduler, output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        self._save_and_tell(super()._save_rng_state, output_dir)

    def _save_and_tell(self, save: Callable[[str], None], output_dir: str) -> None:
        try:
            save(output_dir)
        except SaveError:
            raise  # in the middle of DeepSpeed's save: the others cannot be told
        except WRITER_ERRORS as error:
            self._failures.append(save_error(output_dir, error))
        stop_together(self._failures)


class _NothingLeft(Exception):  # no error: the only way out of the Trainer before its first step
    pass


class _StopBeforeStep(TrainerCallback):
    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
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
