"""Fine-tune a causal language model with LIFT, with full fine-tuning, or with LoRA.

    deepspeed launch/train.py --deepspeed ds_configs/lift_zero2.json \\
        --model_name_or_path MODEL --train_file rows.json --output_dir tuned

Without DeepSpeed it is one plain process (`python launch/train.py ...`); with neither model nor data named it
builds a small model and trains it on generated text. `--help` lists every flag.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import os
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

# DeepSpeed counts the devices of a CPU machine by this and looks when it is imported; torchrun, mpirun and srun have
# names of their own for it.
os.environ.setdefault(
    "LOCAL_SIZE",
    os.environ.get("LOCAL_WORLD_SIZE")
    or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE")
    or os.environ.get("SLURM_NTASKS_PER_NODE")
    or os.environ.get("WORLD_SIZE", "1"),
)

try:
    import trl  # noqa: F401 - what needs it comes below
except ImportError as missing:
    raise SystemExit(f"launch/train.py needs TRL ({missing}): pip install 'lift_ds[trl]'") from None

import datasets
import deepspeed
import torch.distributed as dist
import transformers
from datasets import Dataset
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import lift_ds
import lift_ds.checkpoint
import lift_ds.trainer
from lift_ds import watch
from lift_ds.attachment import require_attachment
from lift_ds.checkpoint.failed_save import WRITER_ERRORS, SaveError, save_error
from lift_ds.demo import run as demo
from lift_ds.logs import get_logger, is_main_rank
from lift_ds.training import arguments, finished, launcher, loading, meeting, model_card, record, reporting, saving
from lift_ds.training.evaluation import Evaluation, of_demo, of_held_out
from lift_ds.training.shared_memory import unlink_shared_memory
from lift_ds.training.trainer import CheckedTrainer

logger = get_logger()

#: Exit codes: an error; settings or data that cannot be used; a checkpoint or the model that could not be saved;
#: Ctrl-C. For a lost rank see `lift_ds.watch`.
FAILED, REFUSED, UNSAVED, INTERRUPTED = 1, 2, 74, 130

#: Seconds the other ranks wait for the launcher to end them once rank 0 has said what is wrong.
_GRACE = 20.0

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


def main(argv: Sequence[str] | None = None) -> int:
    """Set up, train, evaluate, save.

    Args:
        argv: command line; that of the process where None.

    Returns:
        The exit code.
    """
    try:
        try:
            launcher.find_ranks()
            speak_on_one_rank()
            launcher.end_with_command()
            job = set_up(argv)
        except ValueError as error:
            return refuse(error)
        train(job)
        return 0
    except SaveError as error:
        if not watch.is_lost_rank(error):
            leave(refuse(error, UNSAVED))
        leave_first_word_to_rank_0()  # which may be gone because it could not save
        leave(report(error))
    except KeyboardInterrupt:
        if is_main_rank():
            print("interrupted", file=sys.stderr)
        leave(INTERRUPTED)
    except Exception as error:
        if not has_peers():
            raise
        leave(report(error))
    finally:
        if dist.is_initialized():
            watch.begin("leaving the process group")
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
        single_process_group()
        meeting.meet()
    # From here on DeepSpeed's file is known to transformers: under ZeRO-3 a model loads partitioned.
    args = arguments.build(arguments.TrainArguments, values)
    if args.deepspeed:
        # On CPUs Accelerate has made the process group without DeepSpeed, which would take itself to be alone.
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        meeting.limit_collectives(args.ddp_timeout)
        unlink_shared_memory()
        meeting.check_batch(args)
    watch.start(config.stall_timeout)
    meeting.check_same_folder(str(args.output_dir))
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
    watch.begin("building the engine and loading the checkpoint")  # until the first forward
    if job.evaluation is not None:
        logger.info("%s", job.evaluation.announcement(trainer.rows_to_evaluate()))
    finished.train_what_is_left(trainer, job.checkpoint)
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
        with watch.during("saving the trained model", whole=True):
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


def has_peers() -> bool:
    """Tell whether other ranks take part in this run."""
    return dist.is_initialized() and dist.get_world_size() > 1


def report(error: Exception) -> int:
    """Say what went wrong on this rank, in one line where it is that another rank is gone; give the exit code."""
    if not watch.is_lost_rank(error):
        traceback.print_exception(error)
        return FAILED
    where = watch.named_operation(error) or watch.current() or "what the Trainer does between steps"
    what = str(error).strip().splitlines()[0].split(". ")[0]
    tqdm.write(  # not into the line of a progress bar
        f"error: rank {dist.get_rank()}: another rank is gone or does not answer; noticed in {where}: "
        f"{what}. The same command with --resume_from_checkpoint auto continues",
        file=sys.stderr,
    )
    return watch.LOST_RANK


def end(code: int) -> NoReturn:
    """End this process when its work is done, without what Python does last.

    Threads of gloo outlive the process group where DeepSpeed still refers to it, and taking the interpreter down under
    them has aborted a finished run (exit code -6, once in some hundred launches).
    """
    atexit._run_exitfuncs()
    leave(code)


def leave(code: int) -> NoReturn:
    """End this process now: others may be waiting in a collective, or be gone, and an orderly end wait for them."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def refuse(error: Exception, code: int = REFUSED) -> int:
    """Say what is wrong, once; give the exit code.

    One that is still there after rank 0 had the first word met an error of its own, and says so.
    """
    leave_first_word_to_rank_0()
    print(f"error: {error}", file=sys.stderr, flush=True)
    return code


def leave_first_word_to_rank_0() -> None:
    """Wait on the other ranks: the launcher ends all of them with the first that ends."""
    if not is_main_rank():
        time.sleep(_GRACE)


def speak_on_one_rank() -> None:
    """Keep what is the same on every rank to rank 0: warnings, progress bars, the libraries' logs."""
    transformers.logging.set_verbosity_warning()
    if is_main_rank():
        return
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def single_process_group() -> None:
    """Let `python launch/train.py --deepspeed ...` run as one rank, without a launcher."""
    if "RANK" in os.environ:
        return
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


if __name__ == "__main__":
    end(main())
