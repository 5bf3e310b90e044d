"""The description beside a checkpoint: what was saved by this model with this selection is accepted, everything else is
refused with the file and the difference, before anything is loaded.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cases import build
from torch import nn

import lift_ds
from lift_ds.checkpoint import DESCRIPTION, describe, verify

CONFIG = lift_ds.LiftConfig(budget_rank=3, lra_rank=4, target_modules=("tall", "wide", "square"))


def attached(**changes: Any) -> nn.Module:
    return lift_ds.attach(build("matrices"), dataclasses.replace(CONFIG, **changes))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    describe(attached(), tmp_path)
    return tmp_path


def edit(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = directory / DESCRIPTION
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_same_model_and_settings_are_accepted(saved: Path) -> None:
    verify(attached(), saved)
    verify(attached(), str(saved))
    assert [file.name for file in saved.iterdir()] == [DESCRIPTION]  # no half-written file is left


def test_description_says_what_was_trained(saved: Path) -> None:
    content = json.loads((saved / DESCRIPTION).read_text())
    assert content["matrices"] == {
        "tall": {"shape": [48, 12], "entries": 3 * 60},
        "wide": {"shape": [10, 60], "entries": 3 * 70},
        "square": {"shape": [32, 32], "entries": 3 * 64},
    }
    assert lift_ds.LiftConfig.from_dict(content["config"]) == CONFIG


def test_describing_again_replaces_the_description(saved: Path) -> None:
    describe(attached(lra_rank=5), saved)
    verify(attached(lra_rank=5), saved)


@pytest.mark.parametrize(
    "changes",
    [
        {"solver": "svd"},
        {"lr": 1.0},
        {"betas": (0.5, 0.5)},
        {"eps": 1e-3},
        {"weight_decay": 0.5},
        {"refresh_interval": 7},
        {"stall_timeout": None},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_settings_that_change_how_not_what_may_differ(saved: Path, changes: dict[str, Any]) -> None:
    verify(attached(**changes), saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lra_rank": 5}, "saved with lra_rank=4, this run has lra_rank=5"),
        # min(R (m + n), m n) differs first.
        ({"budget_rank": 4}, "tall has shape [48, 12] and 180 entries there, [48, 12] and 240 here"),
        ({"target_modules": ("tall", "wide")}, "it has the matrix square, this model does not"),
        ({"target_modules": None}, "it lacks the matrix whole"),
        ({"target_modules": ("square", "tall", "wide")}, "saved with target_modules="),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_selection_is_refused(saved: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - matched below, without regular expressions
        verify(attached(**changes), saved)
    assert message in str(error.value)
    assert str(saved / DESCRIPTION) in str(error.value)


def test_parameters_trained_beside_are_part_of_it(tmp_path: Path) -> None:
    def with_bias(extra: tuple[str, ...]) -> nn.Module:
        return lift_ds.attach(nn.Sequential(nn.Linear(8, 8)), lift_ds.LiftConfig(density=0.5, extra_trainable=extra))

    describe(with_bias(()), tmp_path)
    with pytest.raises(ValueError, match=r"saved with extra_trainable=\[\], this run has extra_trainable=\['bias'\]"):
        verify(with_bias(("bias",)), tmp_path)


def test_another_way_to_the_same_number_of_entries_is_refused(saved: Path) -> None:
    edit(saved, lambda content: content["config"].update(budget_rank=None, density=0.25))
    with pytest.raises(ValueError, match="saved with budget_rank=None, this run has budget_rank=3"):
        verify(attached(), saved)


def test_another_shape_is_refused(saved: Path) -> None:
    edit(saved, lambda content: content["matrices"]["wide"].update(shape=[60, 10]))
    with pytest.raises(ValueError, match=r"wide has shape \[60, 10\] and 210 entries there, \[10, 60\] and 210 here"):
        verify(attached(), saved)


def test_another_format_is_refused(saved: Path) -> None:
    edit(saved, lambda content: content.update(format=2))
    with pytest.raises(ValueError, match=r"lift\.json: format 2, this version reads 1"):
        verify(attached(), saved)


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint folder '.*nowhere' does not exist"):
        verify(attached(), tmp_path / "nowhere")


def test_folder_without_description_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lift\.json is missing: the folder is no LIFT checkpoint"):
        verify(attached(), tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n "format": 1,\n', r"lift\.json:3: not valid JSON"),
        ("", r"lift\.json:1: not valid JSON"),
        ("[]", r"lift\.json: needs a JSON object"),
        ("{}", r"lift\.json: not a description of a LIFT checkpoint"),
    ],
    ids=["cut off", "empty", "list", "nothing in it"],
)
def test_broken_description_is_refused(saved: Path, text: str, message: str) -> None:
    (saved / DESCRIPTION).write_text(text)
    with pytest.raises(ValueError, match=message):
        verify(attached(), saved)


def test_model_without_lift_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="not attached to this Matrices"):
        verify(build("matrices"), saved)
    with pytest.raises(ValueError, match="not attached to this Matrices"):
        describe(build("matrices"), saved)
