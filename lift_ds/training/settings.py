"""What a run was told: command line and DeepSpeed file, read and checked once, as one object that does not change.

Where several say something about one flag, the first of these has the word: the command line, the DeepSpeed file, what
suits the generated run (where no model and no data are named), the default.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lift_ds import LiftConfig
from lift_ds.config import (
    LIFT_BLOCK,
    TARGET_PRESETS,
    TRAIN_DEFAULTS_BLOCK,
    USUAL_DENSITY,
    did_you_mean,
    read_ds_config,
)
from lift_ds.runtime.logs import get_logger
from lift_ds.runtime.watchdog import limit_of_collectives
from lift_ds.training.arguments import (
    LIFT_FLAGS,
    ScriptArguments,
    TrainArguments,
    Values,
    make_parser,
    own_flags,
)
from lift_ds.training.demo import run as demo
from lift_ds.zero.engine import refuse_optimizer_block
from lift_ds.zero.options import refuse_options

logger = get_logger()

#: Numbers of a DeepSpeed file that are flags of the Trainer too.
_BATCH_KEYS = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
}

#: Values of the Trainer's `--optim` that mean what LiftAdamW does.
_ADAMW = ("adamw_torch", "adamw_torch_fused")

#: Method -> flags that it applies, of those that not every method does.
_APPLIED = {
    "lift": {*LIFT_FLAGS},
    "full": {"stall_timeout"},
    "lora": {"stall_timeout", "target_modules", "exclude_modules", "lora_rank", "lora_alpha", "use_rslora", "use_dora"},
}


@dataclass(frozen=True)
class Settings:
    """All settings of a run."""

    script: ScriptArguments  # model, data and method
    lift: LiftConfig
    trainer: Mapping[str, Any]  # the fields of TrainArguments, which is built when the ranks have met
    is_demo: bool  # neither model nor data were named, so that both are generated

    @property
    def method(self) -> str:
        """lift, full or lora."""
        return self.script.method

    @property
    def base_folder(self) -> Path:
        """Folder of the generated model and data."""
        assert self.is_demo
        return Path(str(self.script.model_name_or_path))


def read_settings(argv: Sequence[str] | None = None) -> Settings:
    """Read the command line, and the DeepSpeed file that it names.

    Args:
        argv: the arguments; those of the process where None.

    Raises:
        ValueError: a setting cannot be used, or two contradict each other.
    """
    values, given = make_parser().read(argv)
    path = values["deepspeed"]
    file = read_ds_config(path) if path else None
    if file is not None:
        said = _flags_of_file(path, file, values, given)
        values, given = values | said, given | said.keys()
    check_method(values, given)
    is_demo = check_sources(values)
    if is_demo:
        logger.info("%s", demo.settle(values, given))
    lift = _lift_config(values, file, given)
    trainer = own_flags(TrainArguments, values | _limit_of_collectives(lift, given) | _adam_of(lift, values))
    # Accelerate fills in every "auto" it finds, at any depth, and refuses those it does not know, such as a solver's.
    own_blocks = (LIFT_BLOCK, TRAIN_DEFAULTS_BLOCK)
    trainer["deepspeed"] = file and {name: value for name, value in file.items() if name not in own_blocks}
    return Settings(ScriptArguments(**own_flags(ScriptArguments, values)), lift, trainer, is_demo)


def _flags_of_file(path: str, file: Mapping[str, Any], values: Values, given: Collection[str]) -> Values:
    """Return what a DeepSpeed file says of flags that were not given: batch sizes, and its "train_defaults" block."""
    defaults = file.get(TRAIN_DEFAULTS_BLOCK, {})
    if not isinstance(defaults, Mapping):
        raise ValueError(f'{path}: the "{TRAIN_DEFAULTS_BLOCK}" block is {defaults!r}; it must be an object of flags')
    for flag in defaults:
        if flag not in values:
            hint = did_you_mean(flag, values).replace("'", "")
            raise ValueError(
                f'{path}: {flag!r} in the "{TRAIN_DEFAULTS_BLOCK}" block is no flag of launch/train.py{hint}'
            )
    numbers = {flag: file[key] for key, flag in _BATCH_KEYS.items() if file.get(key, "auto") != "auto"}
    for key, flag in _BATCH_KEYS.items():
        number = numbers.get(flag, 1)
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f'{path}: {key}={number!r} is no whole number of at least 1, nor "auto"')
        if flag in numbers and flag in given and values[flag] != number:
            raise ValueError(
                f'--{flag} {values[flag]} contradicts {key}={number} of {path}; leave the flag out, or put "auto" there'
            )
    return {flag: value for flag, value in {**numbers, **defaults}.items() if flag not in given}


def check_method(values: Values, given: frozenset[str]) -> None:
    """Refuse or warn of flags that the chosen method does not apply.

    Args:
        values: all flags.
        given: those of the command line.

    Raises:
        ValueError: LIFT is asked to train by another optimizer than AdamW, or LoRA to write a delta.
    """
    method = values["method"]
    if method == "lift":
        for flag in sorted(given & {"optim", "optim_args", "optim_target_modules"}):
            if flag != "optim" or values["optim"] not in _ADAMW:
                raise ValueError(
                    f"--{flag} {values[flag]}: LIFT trains by LiftAdamW, since it carries Adam's moments from one "
                    "selection to the next; leave the flag out"
                )
    if method == "lora" and values["save_delta"]:
        raise ValueError(
            "--save_delta true: --method lora merges its adapters into every entry of their matrices, so that a delta "
            "would be as large as the model; leave the flag out"
        )
    for flag in sorted(given & set().union(*_APPLIED.values()) - _APPLIED[method]):
        logger.warning("--%s is not applied: --method is %s", flag, method)


def check_sources(values: Mapping[str, Any]) -> bool:
    """Check that a model and data are named together, or neither.

    Args:
        values: all flags.

    Returns:
        True when neither is named: the run that needs no download.

    Raises:
        ValueError: one is named without the other, or two sources of data are.
    """
    data = [name for name in ("dataset_name", "train_file") if values[name]]
    if len(data) == 2:
        raise ValueError("--dataset_name and --train_file are both given; name one source of training data")
    if values["model_name_or_path"] and not data:
        raise ValueError("--model_name_or_path is given without data; name --train_file or --dataset_name too")
    if data and not values["model_name_or_path"]:
        raise ValueError(f"--{data[0]} is given without a model; name --model_name_or_path too")
    if values["eval_file"] and not data:
        raise ValueError("--eval_file is given without training data; name --train_file or --dataset_name too")
    return not data


def _lift_config(values: Mapping[str, Any], file: Mapping[str, Any] | None, given: Collection[str]) -> LiftConfig:
    """Return LIFT's settings: those of flags, then of the file's "lift" block, then the defaults and usual density."""
    if file is not None and values["method"] == "lift":
        refuse_optimizer_block(file)
        refuse_options(file)
        if LIFT_BLOCK not in file:
            LiftConfig.from_ds_config(file)  # says what to add
    block = LiftConfig.checked_block((file or {}).get(LIFT_BLOCK, {}))
    flags = {name: values[name] for name in LIFT_FLAGS if values[name] is not None}
    if "seed" in given:  # the Trainer's flag; its default of 42 is not the block's
        flags["seed"] = values["seed"]
    match flags.get("target_modules"):
        case [name] if name in TARGET_PRESETS:
            flags["target_modules"] = name
    budgets = {"budget_rank", "density"}
    if not budgets & block.keys():
        block["density"] = USUAL_DENSITY
    LiftConfig(**block)  # a file that contradicts itself is refused, whatever the flags say
    if budgets & flags.keys():
        block = {name: value for name, value in block.items() if name not in budgets}
    return LiftConfig(**{**block, **flags})


def _adam_of(lift: LiftConfig, values: Values) -> Values:
    """Return Adam's settings that no flag gave; the same ones for every method, so that methods compare."""
    settled = {"learning_rate": lift.lr, "adam_epsilon": lift.eps, "weight_decay": lift.weight_decay}
    settled |= {"adam_beta1": lift.betas[0], "adam_beta2": lift.betas[1]}
    return {name: value for name, value in settled.items() if values[name] is None}


def _limit_of_collectives(lift: LiftConfig, given: Collection[str]) -> Values:
    # For those that nothing watches, such as of TRL's metrics.
    return {} if "ddp_timeout" in given else {"ddp_timeout": limit_of_collectives(lift.stall_timeout)}
