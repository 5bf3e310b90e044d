"""Pins what a DeepSpeed file says to launch/train.py: numbers and flags hold where the command line is silent, a
contradiction is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lift_ds.training import arguments

FILE = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
    "train_batch_size": "auto",
    "train_defaults": {"gradient_checkpointing": False, "max_length": 512},
}


def settled(tmp_path: Path, *flags: str, **changes: object) -> arguments.Values:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({**FILE, **changes}))
    values, given = arguments.make_parser().read(["--deepspeed", str(path), *flags])
    arguments.settle_by_file(values, given)
    return values


def test_a_file_says_what_the_command_line_does_not(tmp_path: Path) -> None:
    values = settled(tmp_path, "--max_length", "256")
    assert values["per_device_train_batch_size"] == 2
    assert values["gradient_accumulation_steps"] == 4
    assert values["gradient_checkpointing"] is False
    assert values["max_length"] == 256
    seen = arguments.deepspeed_settings(values)
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
