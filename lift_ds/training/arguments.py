"""The flags of launch/train.py: TRL's and the Trainer's, and those of LIFT."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

import torch
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool
from trl import SFTConfig

from lift_ds import LiftConfig
from lift_ds.config import LIFT_BLOCK, TARGET_PRESETS, TRAIN_DEFAULTS_BLOCK, USUAL_DENSITY, read_ds_config
from lift_ds.runtime.logs import get_logger, is_main_rank
from lift_ds.training.data import ROW_LAYOUTS, TEXT_FIELD
from lift_ds.zero.engine import refuse_optimizer_block
from lift_ds.zero.options import refuse_options

logger = get_logger()

METHODS = ("lift", "full", "lora")

_PRESETS = ", ".join(TARGET_PRESETS)
_TARGETS_HELP = f"Linear layers to train (lift, lora), by name, or a preset: {_PRESETS}. Default: all but the head."

_EXCLUDE_HELP = "Modules in which nothing is trained (lift, lora), by any components of their names."

#: Flags that override the setting of the same name in the "lift" block.
LIFT_FLAGS = (
    "budget_rank",
    "density",
    "lra_rank",
    "refresh_interval",
    "solver",
    "target_modules",
    "exclude_modules",
    "stall_timeout",
)

#: Values of the Trainer's `--optim` that mean what LiftAdamW does.
_ADAMW = ("adamw_torch", "adamw_torch_fused")

Values = dict[str, Any]
Arguments = TypeVar("Arguments")


def _flag(text: str, default: Any = None, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class ScriptArguments:
    """What to train, on what, and how."""

    model_name_or_path: str | None = _flag("A causal language model of transformers, by path or name.")
    attn_implementation: str | None = _flag(
        "Attention kernel. Default: flash_attention_2 where it is installed and the device can, else sdpa."
    )
    method: str = _flag("What is trained: principal weights, everything, or adapters.", "lift", choices=METHODS)
    lora_rank: int = _flag("Rank of the adapters of --method lora.", 128)
    lora_alpha: int | None = _flag("Scale of the adapters. Default: twice the rank.")

    dataset_name: str | None = _flag("A data set that `datasets` can load, by name or directory.")
    dataset_config: str | None = _flag("Its configuration, where it has several.")
    dataset_split: str = _flag("Its split to train on.", "train")
    train_file: str | None = _flag(f"A JSON array or JSON lines; rows with {ROW_LAYOUTS}.")
    eval_file: str | None = _flag("Held-out rows in the same layouts. Default: split off the training rows.")
    eval_split_size: float = _flag("Share or number of training rows to hold out without --eval_file; 0: none.", 0.05)
    eval_max_rows: int = _flag("Most held-out rows to evaluate; of more, --seed picks some. 0: evaluate all.", 200)

    budget_rank: int | None = _flag("LIFT: train as many entries of each matrix as a LoRA of this rank, not --density.")
    density: float | None = _flag("LIFT: train this share of each matrix. Default: 0.05, or what the lift block says.")
    lra_rank: int | None = _flag("LIFT: rank of the approximation that selects the entries.")
    refresh_interval: int | None = _flag("LIFT: optimizer steps between two selections.")
    solver: str | None = _flag("LIFT: how the low-rank approximation is computed.")
    target_modules: list[str] | None = field(default=None, metadata={"help": _TARGETS_HELP})
    exclude_modules: list[str] | None = field(default=None, metadata={"help": _EXCLUDE_HELP})
    stall_timeout: float | None = _flag("Seconds without progress after which a rank takes another one for lost.")

    def __post_init__(self) -> None:
        if self.eval_max_rows < 0:
            raise ValueError(f"--eval_max_rows {self.eval_max_rows} is below 0; give a number of rows, or 0 for all")


@dataclass
class TrainArguments(SFTConfig):
    """SFTConfig with the paper's schedule, and the precision that the device calls for.

    Adam's settings are None until the "lift" block or the user has given them.
    """

    output_dir: str | None = _flag("Where checkpoints and the trained model go.", "lift_output")
    learning_rate: float | None = _flag("Peak learning rate. Default: lr of the lift block.")
    weight_decay: float | None = _flag("Default: of the lift block.")
    adam_beta1: float | None = _flag("Default: of the lift block.")
    adam_beta2: float | None = _flag("Default: of the lift block.")
    adam_epsilon: float | None = _flag("Default: eps of the lift block.")
    resume_from_checkpoint: str | None = _flag(
        "A checkpoint folder; last: the newest whole one in --output_dir; auto: like last, afresh where there is none."
    )
    warmup_steps: float = _flag("Warm-up steps, or below 1 their share of all steps.", 0.03)
    max_length: int | None = _flag(
        "Most tokens of a row; what comes after is cut off. With --packing: tokens of a pack. none: no limit.", 1024
    )
    drop_long_rows: bool = _flag("Leave rows that are longer than --max_length out, instead of cutting them.", False)
    bf16: bool | None = _flag("Train in bfloat16. Default: on accelerators; float32 on CPUs.")

    use_cpu: bool = _flag("Train on CPUs. Default: where there is no accelerator.", False)
    activation_checkpointing: bool | None = _flag(
        "Recompute activations in backward. Default: as --gradient_checkpointing."
    )

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
        # A token is learned from those before it, so that one alone teaches nothing.
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


def _suggestion(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


class Parser(HfArgumentParser):
    """Refuses in one line, on rank 0 alone, and without the hundreds of flags of a usage text."""

    def error(self, message: str) -> NoReturn:
        if is_main_rank():
            self.exit(2, f"{self.prog}: error: {message} (--help lists every flag)\n")
        raise SystemExit(2)

    def read(self, argv: Sequence[str] | None = None) -> tuple[Values, frozenset[str]]:
        """Read the command line.

        Args:
            argv: the arguments; those of the process where None.

        Returns:
            Every flag with its value, and the names of those that were given.
        """
        namespace, unknown = self.parse_known_args(argv)
        if unknown:
            self.error(f"unknown argument {unknown[0]}{_suggestion(unknown[0].split('=')[0], self._options())}")
        return vars(namespace), frozenset(self._given(argv))

    def _options(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings]

    def _given(self, argv: Sequence[str] | None) -> set[str]:
        # Without defaults, what argparse finds is what was typed.
        bare = make_parser()
        for action in bare._actions:
            action.default = argparse.SUPPRESS
        return set(vars(bare.parse_known_args(argv)[0]))


def make_parser() -> Parser:
    """Return the parser of all flags; an abbreviation could hide a misspelt one, so there are none."""
    kinds = (ScriptArguments, TrainArguments)
    parser = Parser(kinds, allow_abbrev=False, description="Fine-tune a causal language model.")
    for action in parser._actions:
        if action.type is string_to_bool:  # a switch that may be None would otherwise not stand alone, as in `--bf16`
            action.nargs, action.const = "?", True
        elif action.dest == "max_length":
            action.type = _length
    return parser


def _length(text: str) -> int | None:
    if text.lower() in ("none", "null"):
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number, nor none for no limit") from None


def build(kind: type[Arguments], values: Mapping[str, Any]) -> Arguments:
    """Build one of the argument classes from the flags that are its own.

    Args:
        kind: a dataclass.
        values: all flags.

    Returns:
        The checked arguments.
    """
    return kind(**{f.name: values[f.name] for f in dataclasses.fields(kind) if f.init})  # type: ignore[arg-type]


def lift_config(values: Mapping[str, Any]) -> LiftConfig:
    """Settle LIFT's settings: the "lift" block of the DeepSpeed file, then what the flags override.

    Args:
        values: all flags, None where not given.

    Returns:
        The settings; the defaults for what neither says, and the usual density where they give no budget.

    Raises:
        ValueError: the file is unusable, brings an optimizer or has an option that LIFT does not support, or a setting
            is invalid.
    """
    content = read_ds_config(values["deepspeed"]) if values["deepspeed"] else None
    if content is not None and values["method"] == "lift":
        refuse_optimizer_block(content)
        refuse_options(content)
        if LIFT_BLOCK not in content:
            LiftConfig.from_ds_config(content)  # says what to add
    block = LiftConfig.checked_block((content or {}).get(LIFT_BLOCK, {}))
    overrides = {name: values[name] for name in LIFT_FLAGS if values[name] is not None}
    if "target_modules" in overrides:
        overrides["target_modules"] = _targets(overrides["target_modules"])
    budgets = {"budget_rank", "density"}
    if not budgets & block.keys():
        block["density"] = USUAL_DENSITY
    LiftConfig(**block)  # a file that contradicts itself is refused, whatever the flags say
    if budgets & overrides.keys():
        block = {name: value for name, value in block.items() if name not in budgets}
    return LiftConfig(**{**block, **overrides})


def _targets(names: Sequence[str]) -> str | tuple[str, ...]:
    if len(names) == 1 and names[0] in TARGET_PRESETS:
        return names[0]
    return tuple(names)


def deepspeed_settings(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what DeepSpeed and the Trainer are to see of the DeepSpeed file: all but the project's own blocks.

    Accelerate fills in every "auto" it finds, at any depth, and refuses those it does not know, such as a solver's.

    Args:
        values: all flags.

    Returns:
        The content, or None without DeepSpeed.

    Raises:
        ValueError: the file is missing or malformed.
    """
    if not values["deepspeed"]:
        return None
    own = (LIFT_BLOCK, TRAIN_DEFAULTS_BLOCK)
    return {name: value for name, value in read_ds_config(values["deepspeed"]).items() if name not in own}


#: Numbers of a DeepSpeed file that are flags of the Trainer too.
_BATCH_KEYS = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
}


def settle_by_file(values: Values, given: frozenset[str]) -> None:
    """Let the DeepSpeed file say what no flag says: the micro-batch, the accumulation, its "train_defaults" block.

    Args:
        values: all flags; changed in place.
        given: those of the command line.

    Raises:
        ValueError: a flag contradicts a number of the file, or the block has what is no flag.
    """
    if not values["deepspeed"]:
        return
    path = values["deepspeed"]
    content = read_ds_config(path)
    for key, flag in _BATCH_KEYS.items():
        number = content.get(key, "auto")
        if number == "auto":
            continue
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f'{path}: {key}={number!r} is no whole number of at least 1, nor "auto"')
        if flag in given and values[flag] != number:
            raise ValueError(
                f'--{flag} {values[flag]} contradicts {key}={number} of {path}; leave the flag out, or put "auto" there'
            )
        values[flag] = number
    _take_defaults(values, given, content)


def _take_defaults(values: Values, given: frozenset[str], content: Mapping[str, Any]) -> None:
    path = values["deepspeed"]
    defaults = content.get(TRAIN_DEFAULTS_BLOCK, {})
    if not isinstance(defaults, Mapping):
        raise ValueError(f'{path}: the "{TRAIN_DEFAULTS_BLOCK}" block is {defaults!r}; it must be an object of flags')
    for flag, value in defaults.items():
        if flag not in values:
            hint = _suggestion(flag, list(values))
            raise ValueError(
                f'{path}: {flag!r} in the "{TRAIN_DEFAULTS_BLOCK}" block is no flag of launch/train.py{hint}'
            )
        if flag not in given:
            values[flag] = value


def check_method(values: Values, given: frozenset[str]) -> None:
    """Refuse or warn of flags that the chosen method does not apply.

    Args:
        values: all flags.
        given: those of the command line.

    Raises:
        ValueError: LIFT is asked to train by another optimizer than AdamW.
    """
    method = values["method"]
    if method == "lift":
        for flag in sorted(given & {"optim", "optim_args", "optim_target_modules"}):
            if flag != "optim" or values["optim"] not in _ADAMW:
                raise ValueError(
                    f"--{flag} {values[flag]}: LIFT trains by LiftAdamW, since it carries Adam's moments from one "
                    "selection to the next; leave the flag out"
                )
    shared = {"target_modules", "exclude_modules", "stall_timeout"}
    idle = (given & set(LIFT_FLAGS) - shared if method != "lift" else set()) | (
        given & {"lora_rank", "lora_alpha"} if method != "lora" else set()
    )
    if method == "full":
        idle |= given & {"target_modules", "exclude_modules"}
    for flag in sorted(idle):
        logger.warning("--%s is not applied: --method is %s", flag, method)


def settle_optimizer(values: Values, config: LiftConfig) -> None:
    """Fill in Adam's settings that no flag gave; the same ones for every method, so that they compare.

    Args:
        values: all flags; changed in place.
        config: LIFT's settings.
    """
    settled = {
        "learning_rate": config.lr,
        "adam_beta1": config.betas[0],
        "adam_beta2": config.betas[1],
        "adam_epsilon": config.eps,
        "weight_decay": config.weight_decay,
    }
    for name, value in settled.items():
        if values[name] is None:
            values[name] = value


def check_sources(script: ScriptArguments) -> bool:
    """Check that a model and data are named together, or neither.

    Args:
        script: the arguments.

    Returns:
        True when neither is named: the run that needs no download.

    Raises:
        ValueError: one is named without the other, or two sources of data are.
    """
    data = [name for name in ("dataset_name", "train_file") if getattr(script, name)]
    if len(data) == 2:
        raise ValueError("--dataset_name and --train_file are both given; name one source of training data")
    if script.model_name_or_path and not data:
        raise ValueError("--model_name_or_path is given without data; name --train_file or --dataset_name too")
    if data and not script.model_name_or_path:
        raise ValueError(f"--{data[0]} is given without a model; name --model_name_or_path too")
    if script.eval_file and not data:
        raise ValueError("--eval_file is given without training data; name --train_file or --dataset_name too")
    return not data
