"""A training that is killed again and again ends in the weights of an undisturbed one, to the bit.

SIGKILL at random moments (start, forward, backward, step, refresh, save, any), of one rank or of both, more than fifty
times, each followed by the documented restart. Every restart goes on from a whole checkpoint, every rank that is left
ends by itself and names what it was in. Equal to the bit, since nothing but the process is another. The seeds fix the
plan; which instruction is hit is up to the clock.

The ranks of the campaigns are forked after the imports (see kills.py); the last test goes by the real command.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from kills import newest_whole
from launches import CONFIGS, Launch, finish, on_two_ranks, started
from material import Material
from saved import load_like

from lift_ds.runtime import watchdog

pytestmark = pytest.mark.slow

#: Kills in the two campaigns together.
KILLS = {"lift_zero2.json": 35, "lift_zero3.json": 16}

#: Seconds for a campaign. A life takes 3 to 8 on two cores.
LIMIT_SECONDS = 900

Lives = list[dict[str, Any]]


def flags(material: Material, output: Path, steps: int) -> list[object]:
    """A checkpoint after every third step, a refresh after every fourth, the older checkpoints deleted."""
    more = ["--max_steps", steps, "--refresh_interval", 4, "--save_strategy", "steps", "--save_steps", 3]
    more += ["--save_total_limit", 2, "--eval_split_size", 0, "--stall_timeout", 30]
    return material.flags(output, *more)


@pytest.fixture(scope="module", params=list(KILLS))
def campaign(
    request: pytest.FixtureRequest, material: Material, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Lives, int]:
    """The folder of a campaign, its lives, and how many kills there were to be."""
    folder, kills = tmp_path_factory.mktemp("kills"), KILLS[request.param]
    settings = ["--deepspeed", str(CONFIGS / request.param), *map(str, flags(material, folder / "unused", 20))]
    plan = {"flags": settings, "folder": str(folder), "kills": kills, "seed": kills}
    (folder / "plan.json").write_text(json.dumps(plan))
    command = [sys.executable, str(Path(__file__).parent / "kills.py"), folder / "plan.json", folder / "lives.json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    with open(folder / "log", "w") as log:
        done = subprocess.run(command, env=environment, stdout=log, stderr=log, timeout=LIMIT_SECONDS, check=False)
    assert done.returncode == 0, (folder / "log").read_text()[-8000:]
    return folder, json.loads((folder / "lives.json").read_text()), kills


@pytest.mark.timeout(2 * LIMIT_SECONDS)
def test_weights_are_those_of_an_undisturbed_training(campaign: tuple[Path, Lives, int]) -> None:
    folder, lives, kills = campaign
    assert sum(bool(life["victim"]) for life in lives) >= kills
    ends = sorted(folder.glob("end*"))
    assert len(ends) == sum(not life["victim"] for life in lives) > 0
    for end in ends:
        after, expected = load_like(end, folder / "undisturbed" / "out")
        assert [name for name in expected if not torch.equal(after[name], expected[name])] == []


def test_every_start_goes_on_from_a_whole_checkpoint(campaign: tuple[Path, Lives, int]) -> None:
    _, lives, _ = campaign
    last = 0
    for life in lives:
        assert life["resumed_from"] >= last, "a later start went on from an earlier checkpoint"
        last = life["resumed_from"] if life["victim"] else 0  # the next training starts anew
        if life["first_step"] is not None:
            # It is looked at every two milliseconds, so its first step may be missed.
            assert life["resumed_from"] < life["first_step"] <= life["resumed_from"] + 2, life
        if not life["victim"]:
            assert set(life["codes"].values()) == {0}, life


def test_a_rank_that_is_left_ends_by_itself_and_says_why(campaign: tuple[Path, Lives, int]) -> None:
    _, lives, _ = campaign
    left = [life for life in lives if life["survivor_code"] is not None]
    assert left
    for life in left:
        assert life["survivor_code"] in (watchdog.LOST_RANK, watchdog.STALLED), life
        assert life["survivor_code"] == watchdog.STALLED or "another rank is gone" in life["survivor"], life


def test_kills_hit_training_refreshes_and_saves(campaign: tuple[Path, Lives, int]) -> None:
    _, lives, _ = campaign
    operations = [life["operation"] for life in lives if life["victim"]]
    for part in ("backward", "refresh", "saving"):
        assert any(part in operation for operation in operations), operations


def kill_some(launch: Launch, chance: random.Random) -> None:
    """Kill one rank, or everything that belongs to a launch."""
    ranks = [p for p in launch.alive() if any(a.startswith("--local_rank=") for a in p.cmdline())]
    everything = chance.random() < 0.4
    for process in launch.alive() if everything else [chance.choice(ranks)]:
        process.kill()


@pytest.mark.timeout(1200)
def test_the_documented_command_goes_on_after_kills(material: Material, tmp_path: Path) -> None:
    # Long enough that no start comes to the end: the kill follows the first checkpoint after some tenths of a second.
    chance, config, output = random.Random(3), CONFIGS / "lift_zero2.json", tmp_path / "out"
    whole = finish(on_two_ranks(config, *flags(material, tmp_path / "whole" / "out", 80)), tmp_path / "whole")
    command = [*flags(material, output, 80), "--resume_from_checkpoint", "auto"]
    for number in range(3):
        before = newest_whole(output)
        with started(on_two_ranks(config, *command), tmp_path / f"life{number}") as launch:
            launch.wait_until(lambda before=before: newest_whole(output) > before)
            kill_some(launch, chance)
            assert launch.process.wait(75) != 0
            _, left = psutil.wait_procs(launch.alive(), timeout=75)
            assert not left, f"still there: {left}{launch.said()}"
    finish(on_two_ranks(config, *command), tmp_path / "last")
    after, expected = load_like(output, whole.output)
    assert [name for name in expected if not torch.equal(after[name], expected[name])] == []
