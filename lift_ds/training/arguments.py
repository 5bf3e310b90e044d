"""The flags of the trainer: those of model, data and method, those of LIFT, and all of TRL's SFTConfig."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool
from trl import SFTConfig

from lift_ds import LiftConfig
from lift_ds.config import USUAL_DENSITY, did_you_mean
from lift_ds.runtime.logs import get_logger, is_main_rank
from lift_ds.training.data import ROW_LAYOUTS, TEXT_FIELD

logger = get_logger()

METHODS = ("lift", "full", "lora")

#: Settings of LIFT that are flags. A flag overrides the setting of its name in the "lift" block.
LIFT_FLAGS = tuple(setting.name for setting in dataclasses.fields(LiftConfig) if setting.metadata["flag"])

#: What `--help` shows: title -> flags. `--help all` shows the rest too.
GROUPS = {
    "model and data": (
        "model_name_or_path", "train_file", "dataset_name", "eval_file", "eval_split_size", "max_length", "packing",
    ),
    "method": ("method", "lora_rank"),
    "training": (
        "deepspeed", "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size",
        "gradient_accumulation_steps", "gradient_checkpointing", "bf16",
    ),
    "LIFT": ("density", "budget_rank", "lra_rank", "refresh_interval", "target_modules"),
    "output and checkpoints": (
        "output_dir", "save_strategy", "save_steps", "save_total_limit", "resume_from_checkpoint",
    ),
}  # fmt: skip

#: Flags of the Trainer and of TRL that `--help` shows, in fewer words than theirs.
_IN_SHORT = {
    "packing": "Pack several rows into one of --max_length tokens",
    "deepspeed": "A DeepSpeed configuration (default: none, one process without DeepSpeed)",
    "num_train_epochs": "How often all rows are trained on",
    "max_steps": "Steps to train; above 0, instead of --num_train_epochs",
    "per_device_train_batch_size": "Rows of one forward on each device",
    "gradient_accumulation_steps": "Forwards and backwards of one optimizer step",
    "gradient_checkpointing": "Recompute activations: less memory, more time",
    "save_strategy": "When checkpoints are written",
    "save_steps": "Steps between two checkpoints",
    "save_total_limit": "How many checkpoints are kept (default: all)",
}

Values = dict[str, Any]


def _flag(text: str, default: Any = None, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": text, **metadata})


@dataclass(frozen=True)
class ScriptArguments:
    """Which model is trained, on what, and by which method."""

    model_name_or_path: str | None = _flag("A causal language model of transformers, by path or name")
    attn_implementation: str | None = _flag(
        "Attention kernel (default: flash_attention_2 where it is installed and the device can, else sdpa)"
    )
    method: str = _flag("What is trained: principal weights, all weights, or adapters", "lift", choices=METHODS)
    lora_rank: int = _flag("Rank of the adapters of --method lora", 128)
    lora_alpha: int | None = _flag("Scale of the adapters of --method lora (default: twice their rank)")
    use_rslora: bool = _flag(
        "Scale the adapters by alpha over the root of their rank (rsLoRA), not over the rank", False
    )
    use_dora: bool = _flag("Train a magnitude for each row of the weights beside the adapters (DoRA)", False)
    save_delta: bool = _flag("Write delta.safetensors beside the trained model: what changed, for lift-ds apply", False)

    dataset_name: str | None = _flag("A data set that `datasets` can load, by name or folder")
    dataset_config: str | None = _flag("Configuration of the data set, where it has several")
    dataset_split: str = _flag("Split of the data set to train on", "train")
    train_file: str | None = _flag(f"A JSON array or JSON lines; rows with {ROW_LAYOUTS}")
    eval_file: str | None = _flag("Held-out rows (default: split off the training rows)")
    eval_split_size: float = _flag("Share or number of training rows to hold out; 0: none", 0.05)
    eval_max_rows: int = _flag("Most held-out rows to evaluate; --seed picks them. 0: all", 200)

    def __post_init__(self) -> None:
        if self.eval_max_rows < 0:
            raise ValueError(f"--eval_max_rows {self.eval_max_rows} is below 0; give a number of rows, or 0 for all")


@dataclass
class TrainArguments(SFTConfig):
    """SFTConfig with the paper's schedule, and the precision that the device calls for.

    Building one starts torch.distributed, and hands the DeepSpeed configuration to transformers.
    """

    output_dir: str | None = _flag("Where checkpoints and the trained model go", "lift_output")
    learning_rate: float | None = _flag(f"Peak learning rate (default: lr of the lift block, or {LiftConfig.lr})")
    weight_decay: float | None = _flag(f"Decay of AdamW (default: of the lift block, or {LiftConfig.weight_decay})")
    adam_beta1: float | None = _flag(f"AdamW's first beta (default: of the lift block, or {LiftConfig.betas[0]})")
    adam_beta2: float | None = _flag(f"AdamW's second beta (default: of the lift block, or {LiftConfig.betas[1]})")
    adam_epsilon: float | None = _flag(f"AdamW's epsilon (default: of the lift block, or {LiftConfig.eps})")
    resume_from_checkpoint: str | None = _flag(
        "A checkpoint folder; last: the newest whole one; auto: the same, or a fresh start without one"
    )
    warmup_steps: float = _flag("Warm-up steps; below 1, their share of all steps", 0.03)
    max_length: int | None = _flag("Most tokens of a row; the rest is cut off. none: no limit", 1024)
    drop_long_rows: bool = _flag("Leave out rows that are longer than --max_length, instead of cutting them", False)
    bf16: bool | None = _flag("Train in bfloat16 (default: on accelerators; float32 on CPUs)")

    use_cpu: bool = _flag("Train on CPUs, also where there is an accelerator", False)
    activation_checkpointing: bool | None = _flag("The newer name of --gradient_checkpointing")

    def __post_init__(self) -> None:
        self._check_rows()
        # Without the CPU being asked for by name, Accelerate sees one process where DeepSpeed sees all the ranks, and
        # the Trainer refuses bf16.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu
        # Newer transformers spell it activation_checkpointing, and warn of the name that TRL gives a default.
        if self.activation_checkpointing is None:
            self.activation_checkpointing = self.gradient_checkpointing
        super().__post_init__()

    def _check_rows(self) -> None:
        length = self.max_length
        # A token is predicted from those before it, so a row of one token teaches nothing.
        if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 2):
            raise ValueError(f"--max_length {length!r} is no whole number of at least 2, nor none for no limit")
        if length is None and (self.packing or self.eval_packing):
            raise ValueError("--max_length none does not go with packing; give the number of tokens of a pack")
        if length is None and self.drop_long_rows:
            logger.warning("--drop_long_rows is not applied: with --max_length none no row is too long")
        if self.dataset_text_field != TEXT_FIELD:
            raise ValueError(
                f"--dataset_text_field {self.dataset_text_field!r} cannot be used: running text is read from the field "
                f"{TEXT_FIELD!r} alone; rename the field of the data"
            )


class _Lines(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a flag in one of its spellings, and no `(default: None)`."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        shown.option_strings = action.option_strings[:1]
        return super()._format_action_invocation(shown)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class _Help(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        assert isinstance(parser, Parser)
        if is_main_rank():
            print(parser.format_help(everything=values == "all"))
        parser.exit()


class Parser(HfArgumentParser):
    """The parser of all flags. Rank 0 alone says what is wrong, in one line."""

    def error(self, message: str) -> NoReturn:
        if is_main_rank():
            self.exit(2, f"{self.prog}: error: {message} (--help all lists every flag)\n")
        raise SystemExit(2)

    def format_help(self, *, everything: bool = False) -> str:
        """Return the help text.

        Args:
            everything: whether to show the flags that few runs need too.
        """
        shown = {title: [self._option_string_actions[f"--{name}"] for name in names] for title, names in GROUPS.items()}
        if everything:
            rest = [action for action in self._actions if not any(action in group for group in shown.values())]
            own = {*LIFT_FLAGS, *ScriptArguments.__annotations__, *TrainArguments.__annotations__}
            shown["more flags of this trainer"] = [action for action in rest if action.dest in own]
            shown["flags of the Trainer and of TRL"] = [action for action in rest if action.dest not in own]
        formatter = self._get_formatter()
        formatter.add_text(self.description)
        formatter.add_usage(self.usage, self._actions, [])
        for title, actions in shown.items():
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help().rstrip()

    def read(self, argv: Sequence[str] | None = None) -> tuple[Values, frozenset[str]]:
        """Read the command line.

        Args:
            argv: the arguments; those of the process where None.

        Returns:
            Every flag with its value, and the names of those that were given.
        """
        absent = object()
        found = argparse.Namespace(**{action.dest: absent for action in self._actions})
        _, unknown = self.parse_known_args(argv, found)
        if unknown:
            hint = did_you_mean(unknown[0].split("=")[0], self._option_string_actions).replace("'", "")
            self.error(f"unknown argument {unknown[0]}{hint}")
        given = {name: value for name, value in vars(found).items() if value is not absent}
        return vars(self.parse_args([])) | given, frozenset(given)


def make_parser() -> Parser:
    """Return the parser of all flags. Flags cannot be abbreviated: a misspelt one could pass for another."""
    parser = Parser(
        (ScriptArguments, TrainArguments),
        prog="lift-ds train",
        usage="lift-ds train [--flag value ...], or with DeepSpeed: deepspeed launch/train.py [--flag value ...]",
        description="Fine-tune a causal language model with LIFT, in full, or with LoRA. Without model and data it "
        "trains a small generated model on generated text.",
        epilog='A DeepSpeed configuration may set flags too: its "lift" block those of LIFT, its "train_defaults" '
        "block all others. The command line has the last word. --help all shows every flag.",
        formatter_class=_Lines,
        allow_abbrev=False,
        add_help=False,
    )
    _add_lift_flags(parser)
    for action in (action for action in parser._actions if action.nargs != 0):  # not --no_packing and its like
        action.help = _IN_SHORT.get(action.dest, action.help)
        action.metavar = None if action.choices else {int: "N", float: "X"}.get(action.type, "TEXT")
        if action.type is string_to_bool:  # also where the default is None, so that `--bf16` alone means true
            action.nargs, action.const, action.metavar = "?", True, "true|false"
        elif action.dest == "max_length":
            action.type, action.metavar = _length, "N"
    text = "This text; all: every flag"
    parser.add_argument("--help", "-h", action=_Help, nargs="?", choices=["all"], default=argparse.SUPPRESS, help=text)
    return parser


def _add_lift_flags(parser: Parser) -> None:
    hints, defaults = typing.get_type_hints(LiftConfig), LiftConfig(density=USUAL_DENSITY)
    for setting in dataclasses.fields(LiftConfig):
        if setting.metadata["flag"]:
            default = getattr(defaults, setting.name)
            text = setting.metadata["help"] + (f" (default: {default})" if default not in (None, ()) else "")
            names = (f"--{setting.name}", f"--{setting.name.replace('_', '-')}")
            parser.add_argument(*names, help=text, **_of_type(hints[setting.name]))


def _of_type(hint: Any) -> dict[str, Any]:
    """Return argparse's `type` and `nargs` for a type hint such as `int | None` or `tuple[str, ...]`."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in kinds:
        if typing.get_origin(kind) is tuple:
            parts = typing.get_args(kind)
            return {"type": parts[0], "nargs": "+" if ... in parts else len(parts)}
    return {"type": kinds[0]}


def _length(text: str) -> int | None:
    if text.lower() in ("none", "null"):
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number, nor none for no limit") from None


def own_flags(kind: type, values: Mapping[str, Any]) -> Values:
    """Return those of all flags that are fields of a dataclass."""
    return {field.name: values[field.name] for field in dataclasses.fields(kind) if field.init}


def adam_settings(args: TrainingArguments) -> Values:
    """Return the settings of AdamW, by its own names for them."""
    betas = (args.adam_beta1, args.adam_beta2)
    return {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon, "weight_decay": args.weight_decay}
