"""The shipped job: fine-tune a causal language model with LIFT, with full fine-tuning, or with LoRA.

    deepspeed launch/train.py --deepspeed ds_configs/lift_zero2.json \\
        --model_name_or_path MODEL --train_file rows.json --output_dir tuned

`lift-ds train` and `python -m lift_ds.training` are the same without DeepSpeed's launcher: one plain process, or a rank
of torchrun, mpirun or srun. With neither model nor data named it builds a small model and trains it on generated text.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
import transformers
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import lift_ds
import lift_ds.checkpoint
import lift_ds.trainer
from lift_ds.checkpoint.failed_save import WRITER_ERRORS, SaveError, save_error
from lift_ds.model.attachment import require_attachment
from lift_ds.runtime import watchdog
from lift_ds.runtime.logs import get_logger, is_main_rank
from lift_ds.training import (
    arguments,
    endings,
    launcher,
    loading,
    model_card,
    record,
    rendezvous,
    reporting,
    saving,
)
from lift_ds.training.checked_trainer import CheckedTrainer, train_what_is_left
from lift_ds.training.demo import run as demo
from lift_ds.training.evaluation import Evaluation, of_demo, of_held_out
from lift_ds.zero.ranks import init_ranks, unlink_shared_memory

logger = get_logger()

#: Seconds that a collective may wait longer than the watch lets it.
_LATER = 10


@dataclass
class Job:
    """A run that is set up and checked."""

    script: arguments.ScriptArguments
    args: arguments.TrainArguments
    trainer: CheckedTrainer
    tokenizer: PreTrainedTokenizerBase
    base: loading.Base
    about: model_card.Trained
    checkpoint: str | None
    evaluation: Evaluation | None
    demo_base: Path | None


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
    values, given = arguments.make_parser().read(argv)
    arguments.settle_by_file(values, given)
    arguments.check_method(values, given)
    script = arguments.build(arguments.ScriptArguments, values)
    is_demo = arguments.check_sources(script)
    if is_demo:
        logger.info("%s", demo.settle(values, given))
    config = arguments.lift_config(values)
    arguments.settle_optimizer(values, config)
    demo_base = prepare_demo(values) if is_demo else None
    script = arguments.build(arguments.ScriptArguments, values)
    values["deepspeed"] = arguments.deepspeed_settings(values)
    if config.stall_timeout is not None and "ddp_timeout" not in given:
        # Collectives that nothing watches, such as those of TRL's metrics, have the same limit; the watch says more.
        values["ddp_timeout"] = math.ceil(config.stall_timeout) + _LATER
    if values["deepspeed"]:
        rendezvous.be_one_rank()
        rendezvous.meet()
    # From here on DeepSpeed's file is known to transformers: under ZeRO-3 a model loads partitioned.
    args = arguments.build(arguments.TrainArguments, values)
    if args.deepspeed:
        # On CPUs Accelerate has made the process group without DeepSpeed, which would take itself to be alone.
        init_ranks()
        rendezvous.limit_collectives(args.ddp_timeout)
        unlink_shared_memory()
        rendezvous.check_batch(args)
    watchdog.start(config.stall_timeout)
    rendezvous.check_same_folder(str(args.output_dir))
    checkpoint = loading.find_checkpoint(args, committed=script.method == "lift")
    if checkpoint is not None and script.method == "lift":
        loading.load_as_saved(args, checkpoint)
    tokenizer = loading.load_tokenizer(script, args)
    train_rows, held_out = loading.load_data(script, args, tokenizer)
    evaluation = of_demo(demo_base) if demo_base is not None else None
    if held_out is not None:
        evaluation = of_held_out(held_out, script.eval_max_rows, args.seed)
    args.eval_on_start = evaluation is not None
    model, base = loading.load_model(script, args)
    attention = model.config._attn_implementation
    logger.info("%s: attention by %s, weights in %s", script.model_name_or_path, attention, model.dtype)
    trainer = make_trainer(script, args, config, model, tokenizer, train_rows, evaluation, checkpoint)
    if checkpoint is not None and script.method == "lift":
        lift_ds.checkpoint.verify(model, checkpoint, lift_ds.trainer.layout_of(args))
    about = describe(script, args, config, model, len(train_rows))
    trainer.write_card, trainer.use_cache = about.write_card, base.use_cache
    return Job(script, args, trainer, tokenizer, base, about, checkpoint, evaluation, demo_base)


def describe(
    script: arguments.ScriptArguments,
    args: arguments.TrainArguments,
    config: lift_ds.LiftConfig,
    model: PreTrainedModel,
    rows: int,
) -> model_card.Trained:
    """Gather what the model's card will say."""
    if script.method != "lift":
        return model_card.Trained(script, args, None, 1.0, rows)
    attachment = require_attachment(model)
    share = attachment.entries() / sum(layer.shape().numel() for layer in attachment.layers.values())
    return model_card.Trained(script, args, config, share, rows)


def prepare_demo(values: arguments.Values) -> Path:
    """Name the generated model and data as if they had been given."""
    logger.info("preparing the small base model (a minute of training where it is not cached)")
    base = demo.prepare()
    logger.info("base model and data: %s", base)
    values["model_name_or_path"], values["train_file"] = str(base), demo.train_file(base)
    values["eval_split_size"] = 0.0
    return base


def make_trainer(
    script: arguments.ScriptArguments,
    args: arguments.TrainArguments,
    config: lift_ds.LiftConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Dataset,
    evaluation: Evaluation | None,
    checkpoint: str | None,
) -> CheckedTrainer:
    """Build TRL's trainer for the chosen method."""
    extra: dict[str, object] = {}
    callbacks: list[transformers.TrainerCallback] = []
    if script.method == "lift":
        lift_ds.attach(model, config)
        # Not `optimizers=`: under DeepSpeed the Trainer drops that one and builds an AdamW of its own.
        settings = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2)}
        settings |= {"eps": args.adam_epsilon, "weight_decay": args.weight_decay}
        extra["optimizer_cls_and_kwargs"] = (lift_ds.LiftAdamW, {"model": model, **settings})
        callbacks.append(lift_ds.LiftCallback(resume_from_checkpoint=checkpoint))
    elif script.method == "lora":
        extra["peft_config"] = loading.lora_config(script, config)
    trainer = CheckedTrainer(
        model=model,
        args=args,
        train_dataset=train_rows,
        eval_dataset=evaluation.rows if evaluation is not None else None,
        processing_class=tokenizer,
        callbacks=callbacks,
        **extra,
    )
    # First in the list, so that the progress bar and every reporter show what it adds to the logs.
    trainer.callback_handler.callbacks.insert(0, reporting.SpeedCallback())
    trainer.add_callback(record.RecordCallback(config if script.method == "lift" else None, checkpoint))
    return trainer


def train(job: Job) -> None:
    """Train, evaluate again, save the plain model and say what came out."""
    trainer = job.trainer
    watchdog.begin("building the engine and loading the checkpoint")  # until the first forward
    if job.evaluation is not None:
        logger.info("%s", job.evaluation.announcement(trainer.rows_to_evaluate()))
    train_what_is_left(trainer, job.checkpoint)
    after: dict[str, float] = {}
    if job.evaluation is not None:
        logger.info("evaluating the same rows after the last step")
        after = reporting.first_losses([trainer.evaluate()])
    if job.args.deepspeed and trainer.model_wrapped.zero_optimization_partition_weights():
        trainer.model_wrapped.empty_partition_cache()  # an evaluation leaves weights on their way, fetched ahead of use
    if job.script.method == "lift":
        lift_ds.detach(trainer.model)
    model: PreTrainedModel | PeftModel = trainer.model
    folder = str(job.args.output_dir)
    try:
        with watchdog.during("saving the trained model", whole=True):
            tensors = saving.save_plain(model, job.tokenizer, folder, job.base)
    except WRITER_ERRORS as error:
        raise save_error(folder, error, "model") from error
    if not is_main_rank():
        return
    losses = ""
    if job.evaluation is not None:
        before = reporting.first_losses(trainer.state.log_history)
        losses = reporting.loss_table(before, after, job.evaluation.metrics)
        print(losses)
    job.about.write_card(folder, losses)
    print(f"saved to {folder}: a plain Hugging Face model ({tensors} tensors, {job.base.dtype}) and its tokenizer")
    record.note_end(folder)
    if job.demo_base is not None:
        unset_hf_deepspeed_config()  # under ZeRO-3 loading would wait for the other ranks
        print(demo.answer_one(folder, job.demo_base))
