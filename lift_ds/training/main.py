"""The shipped job: fine-tune a causal language model with LIFT, with full fine-tuning, or with LoRA.

    deepspeed launch/train.py --deepspeed ds_configs/lift_zero2.json \\
        --model_name_or_path MODEL --train_file rows.json --output_dir tuned

`lift-ds train` and `python -m lift_ds.training` are the same without DeepSpeed's launcher: one plain process, or a rank
of torchrun, mpirun or srun. With neither model nor data named it builds a small model and trains it on generated text.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
import transformers
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import lift_ds
import lift_ds.checkpoint
from lift_ds.checkpoint.failed_save import WRITER_ERRORS, SaveError, save_error
from lift_ds.model.attachment import require_attachment
from lift_ds.runtime import watchdog
from lift_ds.runtime.logs import get_logger, is_main_rank
from lift_ds.trainer import layout_of
from lift_ds.training import delta, endings, launcher, loading, model_card, record, rendezvous, reporting, saving
from lift_ds.training.arguments import TrainArguments, adam_settings
from lift_ds.training.checked_trainer import CheckedTrainer, train_what_is_left
from lift_ds.training.demo import run as demo
from lift_ds.training.evaluation import Evaluation, of_demo, of_held_out
from lift_ds.training.settings import Settings, read_settings
from lift_ds.zero.process_group import init_ranks, unlink_shared_memory

logger = get_logger()


@dataclass(frozen=True)
class Job:
    """A run that is set up and checked."""

    settings: Settings
    trainer: CheckedTrainer
    tokenizer: PreTrainedTokenizerBase
    base: loading.Base
    about: model_card.Trained
    checkpoint: str | None  # the folder to resume from
    evaluation: Evaluation | None  # held-out rows

    @property
    def folder(self) -> str:
        """Where the trained model goes."""
        return str(self.trainer.args.output_dir)


def run(argv: Sequence[str] | None = None) -> int:
    """Set up, train, evaluate, save.

    Args:
        argv: command line; that of the process where None.

    Returns:
        The exit code.
    """
    try:
        try:
            launcher.find_ranks()
            reporting.speak_on_one_rank()
            launcher.end_with_command()
            job = set_up(argv)
        except ValueError as error:
            return endings.refuse(error)
        train(job)
        return 0
    except SaveError as error:
        if not watchdog.is_lost_rank(error):
            endings.leave(endings.refuse(error, endings.UNSAVED))
        endings.leave_first_word_to_rank_0()  # which may be gone because it could not save
        endings.leave(endings.report(error))
    except KeyboardInterrupt:
        if is_main_rank():
            print("interrupted", file=sys.stderr)
        endings.leave(endings.INTERRUPTED)
    except Exception as error:
        if not endings.has_peers():
            raise
        endings.leave(endings.report(error))
    finally:
        if dist.is_initialized():
            watchdog.begin("leaving the process group")
            dist.destroy_process_group()


def set_up(argv: Sequence[str] | None) -> Job:
    """Build everything a run needs, from the command line to the trainer.

    Raises:
        ValueError: a setting, the model or the data cannot be used; the message says which and why.
    """
    settings = read_settings(argv)
    if settings.is_demo:
        demo.prepare()
    args = join_ranks(settings)
    checkpoint = loading.find_checkpoint(args, committed=settings.method == "lift")
    tokenizer = loading.load_tokenizer(settings.script, args)
    rows, evaluation = load_rows(settings, args, tokenizer)
    args.eval_on_start = evaluation is not None
    model, base = loading.load_model(settings.script, args)
    if settings.script.save_delta:
        delta.check(str(settings.script.model_name_or_path), base, loading.training_dtype(args))
    trainer = make_trainer(settings, args, model, tokenizer, rows, evaluation, checkpoint)
    if checkpoint is not None and settings.method == "lift":
        lift_ds.checkpoint.verify(model, checkpoint, layout_of(args))
    about = model_card.Trained(settings, args, trained_share(model) if settings.method == "lift" else None, len(rows))
    trainer.write_card, trainer.use_cache = about.write_card, base.use_cache
    return Job(settings, trainer, tokenizer, base, about, checkpoint, evaluation)


def join_ranks(settings: Settings) -> TrainArguments:
    """Meet the other ranks and begin torch.distributed; from here on all ranks do the same together.

    Returns:
        The Trainer's arguments. With them transformers knows DeepSpeed's settings, so that under ZeRO-3 a model loads
        partitioned.

    Raises:
        ValueError: the ranks do not come together, or not to the same folder, or the settings are not for so many.
    """
    if settings.trainer["deepspeed"]:
        rendezvous.be_one_rank()
        rendezvous.meet()
    args = TrainArguments(**settings.trainer)
    if args.deepspeed:
        init_ranks()
        rendezvous.limit_collectives(args.ddp_timeout)
        unlink_shared_memory()
        rendezvous.check_batch(args)
    watchdog.start(settings.lift.stall_timeout)
    rendezvous.check_same_folder(str(args.output_dir))
    return args


def load_rows(
    settings: Settings, args: TrainArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, Evaluation | None]:
    """Load the rows to train on, and those to evaluate before the first step and after the last."""
    rows, held_out = loading.load_data(settings.script, args, tokenizer)
    if settings.is_demo:
        return rows, of_demo(settings.base_folder)
    if held_out is None:
        return rows, None
    return rows, of_held_out(held_out, settings.script.eval_max_rows, args.seed)


def make_trainer(
    settings: Settings,
    args: TrainArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    evaluation: Evaluation | None,
    checkpoint: str | None,
) -> CheckedTrainer:
    """Build TRL's trainer for the chosen method."""
    extra: dict[str, object] = {}
    callbacks: list[transformers.TrainerCallback] = []
    if settings.method == "lift":
        lift_ds.attach(model, settings.lift, resume=checkpoint is not None)
        # Not `optimizers=`: under DeepSpeed the Trainer drops that one and builds an AdamW of its own.
        extra["optimizer_cls_and_kwargs"] = (lift_ds.LiftAdamW, {"model": model, **adam_settings(args)})
        callbacks.append(lift_ds.LiftCallback(resume_from_checkpoint=checkpoint))
    elif settings.method == "lora":
        extra["peft_config"] = loading.lora_config(settings.script, settings.lift)
    trainer = CheckedTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=evaluation.rows if evaluation is not None else None,
        processing_class=tokenizer,
        callbacks=callbacks,
        **extra,
    )
    # First in the list, so that the progress bar and every reporter show what it adds to the logs.
    trainer.callback_handler.callbacks.insert(0, reporting.SpeedCallback())
    trainer.add_callback(record.RecordCallback(settings.lift if settings.method == "lift" else None, checkpoint))
    return trainer


def trained_share(model: PreTrainedModel) -> float:
    """Return the share of the managed entries that LIFT trains."""
    attachment = require_attachment(model)
    return attachment.entries() / sum(weight.elements() for weight in attachment.weights.values())


def train(job: Job) -> None:
    """Train, evaluate again, save the plain model and say what came out."""
    watchdog.begin("building the engine and loading the checkpoint")  # until the first forward
    if job.evaluation is not None:
        logger.info("%s", job.evaluation.announcement(job.trainer.rows_to_evaluate()))
    train_what_is_left(job.trainer, job.checkpoint)
    losses = compare_losses(job)
    tensors = save(job)
    if is_main_rank():
        conclude(job, losses, tensors)


def compare_losses(job: Job) -> str:
    """Evaluate the held-out rows again; return the table of their losses before and after, empty without such rows."""
    if job.evaluation is None:
        return ""
    logger.info("evaluating the same rows after the last step")
    after = reporting.first_losses([job.trainer.evaluate()])
    before = reporting.first_losses(job.trainer.state.log_history)
    return reporting.loss_table(before, after, job.evaluation.metrics)


def save(job: Job) -> int:
    """Save the plain model and its tokenizer in the output folder; all ranks call.

    Returns:
        How many tensors this rank has written.

    Raises:
        SaveError: they cannot be written.
    """
    engine = job.trainer.model_wrapped
    if job.trainer.is_deepspeed_enabled and engine.zero_optimization_partition_weights():
        engine.empty_partition_cache()  # an evaluation leaves weights on their way, fetched ahead of use
    model: PreTrainedModel | PeftModel = job.trainer.model
    if job.settings.method == "lift":
        lift_ds.detach(model)
    try:
        with watchdog.during("saving the trained model", whole=True):
            return saving.save_plain(model, job.tokenizer, job.folder, job.base)
    except WRITER_ERRORS as error:
        raise save_error(job.folder, error, "model") from error


def conclude(job: Job, losses: str, tensors: int) -> None:
    """Report the result in the log and in the model's card; for rank 0."""
    if losses:
        print(losses)
    job.about.write_card(job.folder, losses)
    if job.settings.script.save_delta:
        delta.save(str(job.settings.script.model_name_or_path), job.folder)
    print(f"saved to {job.folder}: a plain Hugging Face model ({tensors} tensors, {job.base.dtype}) and its tokenizer")
    record.note_end(job.folder)
    if job.settings.is_demo:
        unset_hf_deepspeed_config()  # under ZeRO-3 loading would wait for the other ranks
        print(demo.answer_one(job.folder, job.settings.base_folder))
