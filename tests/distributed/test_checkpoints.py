"""Pins down checkpoints on real ranks: a universal one continues on other rank counts and ZeRO stages; damaged, mixed
up and interrupted ones are refused or passed over, on all ranks alike and before anything is loaded; a full disk ends
the save on all ranks, and the checkpoint before it still loads.

Losses of a run that changed its layout may differ by the order of float32 sums (1e-6); on one layout nothing may.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks

Results = dict[str, Any]

STEPS = 8
#: Checkpoints that an earlier version has saved; see the README there.
KEPT = Path(__file__).parent / "kept_checkpoints"


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """A disk of two megabytes; None for who may not mount one."""
    folder = tmp_path_factory.mktemp("disk")
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder]).returncode:
        yield None
        return
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def four(folder: Path) -> Results:
    """A run on four ranks, and the first piece of one that will go on on others."""
    return run_ranks("checkpoints", 4, folder, "whole", "0,3,,four")[0]


@pytest.fixture(scope="module")
def pair(folder: Path, four: Results, small_disk: Path | None) -> list[Results]:
    """What two ranks found in one launch, the second piece included."""
    jobs = ["whole", "stages", "damages", "newest", f"kept={KEPT}", *([f"full={small_disk}"] if small_disk else [])]
    return run_ranks("checkpoints", 2, folder, "3,5,four_universal,two", *jobs)


@pytest.fixture(scope="module")
def pieces(folder: Path, four: Results, pair: list[Results]) -> list[Results]:
    """The run that goes on on two ranks, on one and on four again."""
    one = run_ranks("checkpoints", 1, folder, "5,7,two_universal,one")[0]
    last = run_ranks("checkpoints", 4, folder, "7,8,one_universal,")[0]
    return [result["piece"] for result in (four, pair[0], one, last)]


def check_continued(whole: Results, pieces: list[Results]) -> None:
    losses = [loss for piece in pieces for loss in piece["losses"]]
    assert losses == pytest.approx(whole["losses"], abs=1e-6)
    assert len(losses) == STEPS
    end = pieces[-1]
    assert all(torch.equal(end["indices"][name], whole["indices"][name]) for name in whole["indices"])
    for name, weight in whole["weights"].items():
        torch.testing.assert_close(end["weights"][name], weight, atol=1e-6, rtol=0)
    for key in ("applied", "decay", "adam"):
        assert end[key] == whole[key], key
    assert whole["applied"] == [STEPS, STEPS]
    assert whole["adam"] == [STEPS]
    assert whole["decay"] == [0.1, 0.0], "the case cannot tell the groups apart"


@pytest.mark.slow  # three launches; the stages below go through the same conversion
def test_four_ranks_then_two_then_one_then_four(four: Results, pieces: list[Results]) -> None:
    """Cut right after the refresh of step 3, right before that of step 6, and behind it."""
    check_continued(four["whole"], pieces)


def test_zero_2_then_3_then_1(pair: list[Results]) -> None:
    """Cut right before the refresh of step 3 and right after that of step 6."""
    for rank in pair:
        check_continued(rank["whole"], rank["stages"])


def test_every_damage_is_refused_before_anything_is_loaded(pair: list[Results]) -> None:
    first, second = (rank["damages"] for rank in pair)
    assert first["messages"] == second["messages"]
    assert first["untouched"]
    assert second["untouched"]
    assert len(first["messages"]) == 6 * 3 + 2, "three state files, the subspaces of two ranks and the description"
    for name, message in first["messages"].items():
        assert message.startswith("ValueError: "), name
        file = "zero_pp_rank_0_mp_rank_00_optim_states.pt" if name.startswith("of the other") else name.split()[0]
        assert file in message, name


def test_interrupted_saves_are_passed_over(pair: list[Results]) -> None:
    for rank in pair:
        found = rank["newest"]
        # Loaded: the last; the one before the interrupted third, of two steps; not the second any more, which an
        # interrupted save went over; not the one that was saved apart.
        assert found["steps"] == ["two", "two", 2, "one", "one"]
        assert found["latest"] == ["two", "two"], "DeepSpeed's file never names one that is not whole"
        assert "lift.json is missing" in found["damaged tag"]
        assert "exclude_frozen_parameters=True" in found["frozen left out"]


@pytest.mark.parametrize("stage", ["2", "3"])
def test_checkpoints_of_an_earlier_version_continue(stage: str, pair: list[Results]) -> None:
    """As the run did that saved them, up to how another processor rounds."""
    losses = json.loads((KEPT / "losses.json").read_text())[stage]
    assert pair[0]["kept"][stage] == pytest.approx(losses, rel=1e-6)


def test_another_stage_is_told_how_to_convert(pair: list[Results]) -> None:
    for rank in pair:
        message = rank["newest"]["other stage"]
        assert "saved on 2 ranks in ZeRO stage 2, this run has 2 in stage 3" in message
        assert "python -m lift_ds.universal" in message


def test_full_disk_ends_the_save_on_all_ranks(pair: list[Results], small_disk: Path | None) -> None:
    if small_disk is None:
        pytest.skip("needs root, to mount a small tmpfs")
    first, second = (rank["full"] for rank in pair)
    assert first == second
    for part in ("SaveError", "bad could not be saved: the disk is full", "bytes are free", "whole checkpoint is"):
        assert part in first["message"]
    assert first["message"].endswith("good")
    assert (first["latest"], first["taken"], first["step"]) == ("good", "good", 2)
