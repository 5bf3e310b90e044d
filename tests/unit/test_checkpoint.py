"""The description that commits a checkpoint: what was saved by this model with this selection is accepted, everything
else is refused with the file and the difference, before anything is loaded. In one process, so nothing is shared out;
tests/distributed has the same on ranks.
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
from lift_ds.checkpoint import DESCRIPTION, Layout, commit, newest, verify, withdraw
from lift_ds.checkpoint.manifest import read_sealed, write_sealed

CONFIG = lift_ds.LiftConfig(budget_rank=3, lra_rank=4, target_modules=("tall", "wide", "square"))


def attached(**changes: Any) -> nn.Module:
    return lift_ds.attach(build("matrices"), dataclasses.replace(CONFIG, **changes))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path)


def save(folder: Path, **options: Any) -> Path:
    """Write two files as a framework would, and commit them."""
    (folder / "inner").mkdir(parents=True, exist_ok=True)
    (folder / "inner" / "rank_0_states.pt").write_bytes(bytes(range(200)))
    (folder / "trainer_state.json").write_text('{"global_step": 4}')
    commit(attached(), folder, **options)
    return folder


def edit(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = directory / DESCRIPTION
    content = read_sealed(path, 2)
    change(content)
    write_sealed(path, content)


def test_same_model_and_settings_are_accepted(saved: Path) -> None:
    verify(attached(), saved)
    verify(attached(), str(saved))
    # No half-written file is left.
    assert sorted(path.name for path in saved.iterdir()) == ["inner", DESCRIPTION, "trainer_state.json"]


def test_description_says_what_was_trained(saved: Path) -> None:
    content = json.loads((saved / DESCRIPTION).read_text())
    assert content["matrices"] == {
        "tall": {"shape": [48, 12], "entries": 3 * 60},
        "wide": {"shape": [10, 60], "entries": 3 * 70},
        "square": {"shape": [32, 32], "entries": 3 * 64},
    }
    assert lift_ds.LiftConfig.from_dict(content["config"]) == CONFIG


def test_describing_again_replaces_the_description(saved: Path) -> None:
    commit(attached(lra_rank=5), saved)
    verify(attached(lra_rank=5), saved)


def test_saving_over_the_only_checkpoint_says_that_there_is_no_other(tmp_path: Path, lift_log: list[str]) -> None:
    only = save(tmp_path / "checkpoint-1")
    lift_log.clear()
    withdraw(only)
    assert lift_log == [f"WARNING saving over the checkpoint {only}; until this save is complete there is no whole one"]


def test_saving_over_one_of_two_names_the_other(tmp_path: Path, lift_log: list[str]) -> None:
    other, newer = save(tmp_path / "checkpoint-1"), save(tmp_path / "checkpoint-2")
    lift_log.clear()
    withdraw(newer)
    (line,) = lift_log
    assert line.endswith(f"until this save is complete the last whole one is {other.name}")


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

    commit(with_bias(()), tmp_path)
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
    edit(saved, lambda content: content.update(format=1))
    with pytest.raises(ValueError, match=r"lift\.json: format 1, this version reads 2"):
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
        ('{\n "format": 2,\n', r"lift\.json:3: not valid JSON"),
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
        commit(build("matrices"), saved)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (flip, "its content is not what was saved"),
    "cut off": (cut, "bytes, it was saved with"),
    "missing": (Path.unlink, "is missing, it was saved with"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["inner/rank_0_states.pt", "trainer_state.json"])
def test_damaged_file_is_named(saved: Path, name: str, damage: str) -> None:
    change, message = DAMAGES[damage]
    change(saved / name)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        verify(attached(), saved)


def test_every_flipped_bit_of_the_description_is_refused(saved: Path) -> None:
    """It decides what the other files are compared with."""
    path = saved / DESCRIPTION
    whole = path.read_bytes()
    model = attached()
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 4
        path.write_bytes(damaged)
        try:
            verify(model, saved)
        except ValueError:
            continue
        assert not damaged[position : position + 1].strip(), "only white space does not matter"


def test_files_of_two_checkpoints_do_not_mix(tmp_path: Path) -> None:
    first, second = save(tmp_path / "first"), tmp_path / "second"
    (second / "inner").mkdir(parents=True)
    (second / "inner" / "rank_0_states.pt").write_bytes(bytes(200))  # the same size
    (second / "trainer_state.json").write_text('{"global_step": 8}')
    commit(attached(), second)
    (first / "inner" / "rank_0_states.pt").write_bytes((second / "inner" / "rank_0_states.pt").read_bytes())
    with pytest.raises(ValueError, match=r"rank_0_states\.pt: its content is not what was saved"):
        verify(attached(), first)


def test_foreign_states_are_refused_and_notes_are_not(saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    verify(attached(), saved)
    (saved / "inner" / "rank_1_states.pt").write_text("another rank's")
    with pytest.raises(ValueError, match=r"rank_1_states\.pt was not saved with this checkpoint"):
        verify(attached(), saved)


def test_newest_whole_checkpoint_is_taken_and_the_others_named(tmp_path: Path) -> None:
    folders = [save(tmp_path / name) for name in ("step1", "then", "last")]  # neither by name nor by its length
    assert newest(folders).taken == "last"
    cut(folders[2] / "inner" / "rank_0_states.pt")
    (tmp_path / "step4").mkdir()
    choice = newest([*folders, tmp_path / "step4"])
    assert choice.taken == "then"
    assert list(choice.passed_over) == ["last", "step4"]
    assert "rank_0_states.pt has 199 bytes, it was saved with 200" in str(choice)
    assert "step4: lift.json is missing" in str(choice)
    assert newest([]).taken is None


def test_checkpoint_kept_apart_is_not_taken(tmp_path: Path) -> None:
    folders = [save(tmp_path / "first"), save(tmp_path / "second", latest=False)]
    assert newest(folders).taken == "first"


def test_of_a_checkpoint_and_its_universal_copy_the_one_that_loads_is_taken(tmp_path: Path) -> None:
    layout = Layout(ranks=4, zero_stage=2)
    plain, universal = (save(tmp_path / name, step=8, layout=layout) for name in ("plain", "universal"))
    written = read_sealed(plain / DESCRIPTION, 2)["written"]
    edit(universal, lambda content: content.update(universal=True, written=written))
    assert newest([plain, universal], layout).taken == "plain"
    for other in (Layout(2, 2), Layout(4, 3)):
        assert newest([plain, universal], other).taken == "universal"
        with pytest.raises(ValueError, match=r"saved on 4 ranks in ZeRO stage 2, this run has .*lift_ds\.universal"):
            verify(attached(), plain, other)
        verify(attached(), universal, other)
    verify(attached(), plain, layout)
    with pytest.raises(ValueError, match="a universal checkpoint loads in ZeRO stage 1, 2 or 3"):
        verify(attached(), universal, Layout(1, 0))


def test_saving_over_a_checkpoint_takes_its_description_first(saved: Path) -> None:
    withdraw(saved)
    assert newest([saved]).taken is None
    withdraw(saved)  # nothing to take
