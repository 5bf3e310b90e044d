"""Pins what a DeepSpeed file says to launch/train.py: numbers and flags hold where the command line is silent, a
contradiction is refused. Pins also how much is trained where nobody says it, which flags say which rows are used, and
that a flag that cannot be applied is refused or warned of.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lift_ds import LiftConfig
from lift_ds.training import arguments, settings

SOURCES = ("--model_name_or_path", "model", "--train_file", "rows.json")

FILE = {
    "lift": {},
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
    "train_batch_size": "auto",
    "train_defaults": {"gradient_checkpointing": False, "max_length": 512},
}


def settled(tmp_path: Path, *flags: str, **changes: object) -> Mapping[str, Any]:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({**FILE, **changes}))
    return settings.read_settings(["--deepspeed", str(path), *SOURCES, *flags]).trainer


def test_a_file_says_what_the_command_line_does_not(tmp_path: Path) -> None:
    values = settled(tmp_path, "--max_length", "256")
    assert values["per_device_train_batch_size"] == 2
    assert values["gradient_accumulation_steps"] == 4
    assert values["gradient_checkpointing"] is False
    assert values["max_length"] == 256
    seen = values["deepspeed"]
    assert seen is not None
    assert "train_defaults" not in seen


def test_auto_leaves_the_flags_alone(tmp_path: Path) -> None:
    auto: dict[str, object] = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
    values = settled(tmp_path, "--per_device_train_batch_size", "3", **auto)
    assert values["per_device_train_batch_size"] == 3
    assert values["gradient_accumulation_steps"] == 1


def test_a_flag_may_repeat_the_file_and_not_contradict_it(tmp_path: Path) -> None:
    assert settled(tmp_path, "--per_device_train_batch_size", "2")["per_device_train_batch_size"] == 2
    with pytest.raises(
        ValueError, match=r"--per_device_train_batch_size 3 contradicts train_micro_batch_size_per_gpu=2"
    ):
        settled(tmp_path, "--per_device_train_batch_size", "3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0 is no whole number"),
        ({"train_defaults": {"max_lenght": 5}}, "'max_lenght' .* did you mean max_length"),
        ({"train_defaults": [1]}, "must be an object of flags"),
    ],
)
def test_what_the_file_cannot_say(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        settled(tmp_path, **changes)


def built(*flags: str) -> arguments.TrainArguments:
    return arguments.TrainArguments(**settings.read_settings([*SOURCES, *flags]).trainer)


@pytest.mark.parametrize(("given", "length"), [("none", None), ("None", None), ("null", None), ("256", 256)])
def test_max_length_is_a_number_or_none(given: str, length: int | None) -> None:
    assert built("--max_length", given).max_length == length
    assert built().max_length == 1024


def test_none_holds_against_the_file(tmp_path: Path) -> None:
    assert settled(tmp_path, "--max_length", "none")["max_length"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_length", "1"], "--max_length 1 is no whole number of at least 2, nor none"),
        (["--max_length", "-5"], "--max_length -5 is no whole number of at least 2, nor none"),
        (["--max_length", "none", "--packing"], "--max_length none does not go with packing"),
        (["--max_length", "none", "--eval_packing"], "--max_length none does not go with packing"),
        (["--dataset_text_field", "body"], "--dataset_text_field 'body' .* from the field 'text' alone"),
    ],
)
def test_rows_cannot_be_cut_so(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built(*flags)


def test_a_length_in_words_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        built("--max_length", "long")
    assert "--max-length: 'long' is no whole number, nor none for no limit" in capsys.readouterr().err


def test_long_rows_are_left_out_on_request(lift_log: list[str]) -> None:
    assert not built().drop_long_rows
    assert built("--drop_long_rows").drop_long_rows
    assert lift_log == []
    assert built("--drop_long_rows", "--max_length", "none").drop_long_rows
    assert lift_log == ["WARNING --drop_long_rows is not applied: with --max_length none no row is too long"]


def test_a_negative_number_of_rows_to_evaluate_is_refused() -> None:
    with pytest.raises(ValueError, match="--eval_max_rows -1 is below 0; give a number of rows, or 0 for all"):
        settings.read_settings([*SOURCES, "--eval_max_rows", "-1"])


def lift_settings(tmp_path: Path, block: dict[str, object], *flags: str) -> LiftConfig:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"lift": block}))
    return settings.read_settings(["--deepspeed", str(path), *SOURCES, *flags]).lift


def test_a_twentieth_is_trained_unless_file_or_flag_says_otherwise(tmp_path: Path) -> None:
    said = [
        (lift_settings(tmp_path, {}), (None, 0.05)),
        (lift_settings(tmp_path, {"density": 0.1}), (None, 0.1)),
        (lift_settings(tmp_path, {"budget_rank": 8}), (8, None)),
        (lift_settings(tmp_path, {}, "--budget_rank", "8"), (8, None)),
        (lift_settings(tmp_path, {"density": 0.1}, "--budget_rank", "8"), (8, None)),
        (lift_settings(tmp_path, {"budget_rank": 8}, "--density", "0.2"), (None, 0.2)),
        (settings.read_settings(SOURCES).lift, (None, 0.05)),
    ]
    assert [(config.budget_rank, config.density) for config, _ in said] == [budget for _, budget in said]


def test_the_seed_of_a_run_is_that_of_its_selection_too(tmp_path: Path) -> None:
    assert lift_settings(tmp_path, {"seed": 5}).seed == 5
    assert lift_settings(tmp_path, {"seed": 5}, "--seed", "7").seed == 7
    assert settings.read_settings([*SOURCES, "--seed", "7"]).lift.seed == 7
    assert settings.read_settings(SOURCES).lift.seed == 0  # the Trainer's default is its own


def check(*flags: str) -> None:
    settings.check_method(*arguments.make_parser().read(flags))


@pytest.mark.parametrize(
    "flags", [("--optim", "adafactor"), ("--optim_args", "weight_decay=1"), ("--optim_target_modules", "all-linear")]
)
def test_lift_does_not_train_by_another_optimizer(flags: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=f"{flags[0]} .*LIFT trains by LiftAdamW.*leave the flag out"):
        check(*flags)


def test_adamw_by_name_is_what_lift_does(lift_log: list[str]) -> None:
    check("--optim", "adamw_torch")
    check("--optim", "adafactor", "--method", "full")
    assert lift_log == []


@pytest.mark.parametrize(
    ("flags", "idle"),
    [
        (("--method", "full", "--density", "0.1", "--exclude_modules", "head"), {"density", "exclude_modules"}),
        (("--method", "lora", "--lra_rank", "4", "--exclude_modules", "head"), {"lra_rank"}),
        (("--lora_rank", "4", "--use_dora", "true"), {"lora_rank", "use_dora"}),
    ],
)
def test_a_flag_of_another_method_is_warned_of(flags: tuple[str, ...], idle: set[str], lift_log: list[str]) -> None:
    check(*flags)
    method = dict(zip(flags[::2], flags[1::2], strict=True)).get("--method", "lift")
    assert lift_log == [f"WARNING --{flag} is not applied: --method is {method}" for flag in sorted(idle)]


def helped(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """Return the flags that a help text shows."""
    with pytest.raises(SystemExit):
        arguments.make_parser().read(["--help", *words])
    return re.findall(r"^  (--\w+)", capsys.readouterr().out, re.MULTILINE)


def test_help_shows_what_most_runs_need_and_all_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    few, every = helped(capsys), helped(capsys, "all")
    assert set(few) < set(every)
    assert len(few) < 30 < len(every)
    spelt = [action.option_strings[0] for action in arguments.make_parser()._actions]
    assert sorted(every) == sorted(spelt), "each flag once"


def test_every_flag_of_lift_sets_the_setting_of_its_name() -> None:
    wanted = {
        "budget_rank": 8, "density": None, "lra_rank": 4, "refresh_interval": 9, "refresh_parts": 3, "solver": "gram",
        "criterion": "random", "gradient_batches": 2,
        "selection_tolerance": 0.1, "block_shape": (2, 4), "target_modules": ("q_proj", "v_proj"),
        "exclude_modules": ("head",), "extra_trainable": ("bias", "norm"), "index_placement": "replicated",
        "refresh_memory_gib": 1.5, "stall_timeout": 60.0, "frozen_weights": "8",
    }  # fmt: skip
    flags: list[str] = []
    for name, value in wanted.items():
        if value is not None:
            flags += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    assert set(wanted) == set(arguments.LIFT_FLAGS)
    assert settings.read_settings([*SOURCES, *flags]).lift == LiftConfig(**wanted)
    preset = settings.read_settings([*SOURCES, "--target_modules", "LIFT_MLP"]).lift
    assert preset.target_modules == "LIFT_MLP"


def test_the_generated_run_takes_what_command_line_and_file_leave_open(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(FILE))
    read = settings.read_settings(["--deepspeed", str(path), "--max_steps", "3"])
    assert read.is_demo
    assert read.trainer["max_steps"] == 3
    assert read.trainer["per_device_train_batch_size"] == FILE["train_micro_batch_size_per_gpu"]
    assert read.trainer["logging_steps"] == 10
    assert read.lift.budget_rank == 16


def test_lora_writes_no_delta() -> None:
    """Its adapters are merged into every entry."""
    settings.read_settings([*SOURCES, "--save_delta", "true"])
    with pytest.raises(ValueError, match="--save_delta true: --method lora merges"):
        settings.read_settings([*SOURCES, "--save_delta", "true", "--method", "lora"])
