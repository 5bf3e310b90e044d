"""Loading of the model, its tokenizer and the data."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import is_flash_attn_2_available

from lift_ds import LiftConfig
from lift_ds.checkpoint import Choice, newest, read
from lift_ds.config import TARGET_PRESETS
from lift_ds.runtime.logs import get_logger
from lift_ds.runtime.ranks import by_main
from lift_ds.trainer import layout_of
from lift_ds.training.arguments import ScriptArguments, TrainArguments
from lift_ds.training.data import check_chat_template, check_loss, hold_out, load_file, load_named

logger = get_logger()

#: Values of `--resume_from_checkpoint` that mean the newest whole checkpoint in --output_dir; the second one starts
#: afresh where there is none.
LAST, AUTO = "last", "auto"


def training_dtype(args: TrainArguments) -> torch.dtype:
    """Return the dtype the weights are held in while they are trained."""
    if args.bf16:
        return torch.bfloat16
    # Without DeepSpeed, float16 training keeps its weights in float32 and scales the loss.
    return torch.float16 if args.fp16 and args.deepspeed else torch.float32


@dataclass(frozen=True)
class Base:
    """What the saved model is to have of the base it came from."""

    dtype: torch.dtype  # of the checkpoint
    use_cache: bool  # of the configuration


def load_model(script: ScriptArguments, args: TrainArguments) -> tuple[PreTrainedModel, Base]:
    """Load the base model in the dtype of training.

    Under ZeRO-3 the weights are partitioned while they load, for which `args` must exist already.

    Args:
        script: names the model.
        args: gives the precision.

    Returns:
        The model, and what of its checkpoint it is to be saved with.

    Raises:
        ValueError: the model cannot be found, or is no causal language model.
    """
    name = script.model_name_or_path
    assert name is not None
    trusted = {"trust_remote_code": args.trust_remote_code}
    dtype = training_dtype(args)
    with _named_where_it_fails(name):
        config = AutoConfig.from_pretrained(name, **trusted)
        base_dtype = config.dtype or dtype
        if base_dtype != dtype:
            logger.warning("%s is stored in %s, trained in %s, and saved in %s", name, base_dtype, dtype, base_dtype)
        model = _with_attention(name, script.attn_implementation, dtype, args, trusted)
    logger.info("%s: attention by %s, weights in %s", name, model.config._attn_implementation, model.dtype)
    return model, Base(base_dtype, getattr(config, "use_cache", True))


@contextlib.contextmanager
def _named_where_it_fails(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if name.startswith((".", "/", "~")) and not Path(name).is_dir():
            reason = "there is no such folder"
        raise ValueError(f"--model_name_or_path {name!r} cannot be loaded: {reason}") from error


def _with_attention(
    name: str, asked: str | None, dtype: torch.dtype, args: TrainArguments, trusted: dict[str, Any]
) -> PreTrainedModel:
    chosen = asked or ("flash_attention_2" if flash_attention_fits(dtype, args) else None)
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation=chosen, **trusted)
    except ValueError as error:
        # A model may lack the kernel that the machine has; what was asked for by name is not replaced.
        if asked or chosen is None:
            raise
        logger.warning("%s does not run with %s (%s); using its default attention", name, chosen, error)
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **trusted)


def flash_attention_fits(dtype: torch.dtype, args: TrainArguments) -> bool:
    """Tell whether FlashAttention 2 is installed and runs on this device in this precision."""
    return (
        dtype in (torch.bfloat16, torch.float16)
        and not args.use_cpu
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability() >= (8, 0)
        and bool(is_flash_attn_2_available())
    )


def load_tokenizer(script: ScriptArguments, args: TrainArguments) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the base model.

    Raises:
        ValueError: there is none, or it has no end-of-text token to close a completion with.
    """
    name = script.model_name_or_path
    assert name is not None
    with _named_where_it_fails(name):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    if tokenizer.eos_token is None and args.eos_token is None:
        raise ValueError(f"the tokenizer of {name} has no end-of-text token; name one of its tokens with --eos_token")
    return tokenizer


def load_data(
    script: ScriptArguments, args: TrainArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, Dataset | None]:
    """Load and check the rows to train on and those held out.

    Args:
        script: names the data.
        args: gives the seed, the chat template where one is named, and what the loss is to be on.
        tokenizer: renders chats.

    Returns:
        Training rows and held-out rows, None where none are wanted.

    Raises:
        ValueError: the data cannot be used; says where and why.
    """
    if script.train_file:
        rows = load_file(script.train_file)
    else:
        assert script.dataset_name is not None
        rows = load_named(script.dataset_name, script.dataset_config, script.dataset_split)
    held_out = load_file(script.eval_file) if script.eval_file else None
    for part in (rows, held_out):
        if part is not None:
            check_chat_template(part, tokenizer.chat_template, args.chat_template_path)
    check_loss(rows, args.completion_only_loss)
    if held_out is None and script.eval_split_size != 0:
        return hold_out(rows, script.eval_split_size, args.seed)
    return rows, held_out


def lora_config(script: ScriptArguments, config: LiftConfig) -> LoraConfig:
    """Return PEFT's settings for adapters on the layers that LIFT would manage."""
    targets = config.target_modules
    if isinstance(targets, str):
        targets = TARGET_PRESETS[targets]
    inside = "|".join(map(re.escape, config.exclude_modules))  # in any place of a dotted name, as LIFT means it
    return LoraConfig(
        r=script.lora_rank,
        lora_alpha=script.lora_alpha or 2 * script.lora_rank,
        use_rslora=script.use_rslora,
        use_dora=script.use_dora,
        target_modules="all-linear" if targets is None else list(targets),
        exclude_modules=rf"(.*\.)?({inside})(\..*)?" if inside else None,
        task_type="CAUSAL_LM",
    )


def find_checkpoint(args: TrainArguments, *, committed: bool) -> str | None:
    """Find the checkpoint to resume from, and have DeepSpeed load it in the form it was saved in; all ranks call.

    Args:
        args: `resume_from_checkpoint` is a folder, "last" for the newest whole one in `output_dir`, or "auto" for the
            same where there is one and a fresh start where there is none.
        committed: whether checkpoints of this run carry LIFT's description, without which they are not whole.

    Returns:
        The folder, or None to start anew.

    Raises:
        ValueError: it is not there, is no checkpoint of the Trainer, or has no description that can be relied on; or
            the states of this run are on a disk.
    """
    asked = args.resume_from_checkpoint
    if not asked:
        return None
    found = _newest_checkpoint(args, asked, committed) if asked in (LAST, AUTO) else _named_checkpoint(args, asked)
    if found is not None and committed:
        _load_as_saved(args, found)
    return found


def _newest_checkpoint(args: TrainArguments, asked: str, committed: bool) -> str | None:
    output = Path(str(args.output_dir))
    choice = by_main(lambda: newest(_checkpoints_in(output), layout_of(args)) if committed else _last_ended(output))
    if choice.taken is not None:
        logger.info("resuming from the newest whole checkpoint in %s: %s", output, choice)
        return str(output / choice.taken)
    nothing = f"{output} holds no whole checkpoint" + (f": {choice}" if choice.passed_over else "")
    if asked == LAST:
        raise ValueError(f"--resume_from_checkpoint {LAST}: {nothing}; {AUTO!r} would start afresh")
    logger.info("starting afresh: %s", nothing)
    return None


def _named_checkpoint(args: TrainArguments, asked: str) -> str:
    folder, flag = Path(asked), f"--resume_from_checkpoint {asked}"
    if not folder.is_dir():
        raise ValueError(f"{flag}: no such folder; give a checkpoint-<step> folder, {LAST!r} or {AUTO!r}")
    if not (folder / TRAINER_STATE_NAME).is_file():
        raise ValueError(f"{flag}: without trainer_state.json it is no checkpoint, or one not written to its end")
    if args.deepspeed and not any(folder.glob("global_step*")):
        raise ValueError(f"{flag}: it was not saved under DeepSpeed; resume without --deepspeed, or start anew")
    return str(folder)


def _checkpoints_in(output: Path) -> list[Path]:
    """The `checkpoint-<step>` folders by their steps, and universal copies of them."""
    found = [
        (re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)(-universal)?", path.name), path) for path in output.glob("*")
    ]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match and path.is_dir())]


def _last_ended(output: Path) -> Choice:
    """The last checkpoint of a run without LIFT, as far as the Trainer's own files tell."""
    folders = _checkpoints_in(output)
    ended = [path.name for path in folders if (path / TRAINER_STATE_NAME).is_file()]
    missing = {path.name: f"{TRAINER_STATE_NAME} is missing" for path in folders if path.name not in ended}
    return Choice(ended[-1] if ended else None, missing)


def _load_as_saved(args: TrainArguments, checkpoint: str) -> None:
    """Tell DeepSpeed in which form a checkpoint was saved.

    A run that resumed from a universal checkpoint saves plain ones, and its restarts use the same file.
    """
    universal = by_main(lambda: read(checkpoint)["universal"])
    if not args.deepspeed:
        return
    for key in ("offload_param", "offload_optimizer"):
        # The Trainer loads a checkpoint before LIFT is bound to the engine, which has to see to shards on a disk.
        if args.hf_deepspeed_config.get_value(f"zero_optimization.{key}.device") == "nvme":
            raise ValueError(
                f'the DeepSpeed configuration has {key}.device="nvme", from which a Trainer cannot resume; '
                'use "cpu", or lift_ds.initialize in a loop of your own'
            )
    args.hf_deepspeed_config.config.setdefault("checkpoint", {})["load_universal"] = universal
