"""One command line for the first start and every restart: killed at any moment, or out of disk, it goes on from the
newest whole checkpoint and ends in the weights of a run that was never stopped.

To the bit where nothing but the process is another; to 1e-6 from a universal checkpoint in another ZeRO stage, which
adds the same numbers in another order.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from launches import CONFIGS, Finished, finish, on_two_ranks, started
from material import EIGHT_STEPS, Material
from saved import load_like

from lift_ds.checkpoint import DESCRIPTION, newest

#: Exit code of a run that could not save.
UNSAVED = 74


def checkpoints(output: Path) -> list[Path]:
    return sorted(output.glob("checkpoint-*"))


def test_killed_run_restarts_by_the_same_command(eight_steps: Finished, material: Material, tmp_path: Path) -> None:
    output = tmp_path / "out"
    flags = [*EIGHT_STEPS, "--save_steps", 2, "--save_total_limit", 1, "--resume_from_checkpoint", "auto"]
    command = on_two_ranks(CONFIGS / "lift_zero2.json", *material.flags(output, *flags))
    with started(command, tmp_path / "first") as launch:
        # The second save has begun; whether it has ended, and what was deleted, is left to chance.
        launch.wait_until(lambda: (output / "checkpoint-4").exists())
        os.killpg(launch.process.pid, signal.SIGKILL)
        for process in launch.alive():
            process.send_signal(signal.SIGKILL)
        assert "starting afresh" in launch.stderr
    choice = newest(checkpoints(output))
    assert choice.taken in ("checkpoint-2", "checkpoint-4"), choice
    shutil.copytree(output / choice.taken, output / "checkpoint-5")
    (output / "checkpoint-5" / DESCRIPTION).unlink()  # as if there had been a third one

    ended = finish(command, tmp_path)
    (line,) = re.findall(r"resuming from the newest whole checkpoint in .*", ended.text)
    assert f": {choice.taken} (passed over " in line
    assert f"checkpoint-5: {DESCRIPTION} is missing" in line
    after, expected = load_like(ended.output, eight_steps.output)
    assert [name for name in expected if not torch.equal(after[name], expected[name])] == []
    assert newest(checkpoints(output)).taken == "checkpoint-8"
    assert len(checkpoints(output)) == 1


@pytest.fixture
def small_disk(eight_steps: Finished, tmp_path: Path) -> Iterator[Path]:
    """A disk with room for one and a half checkpoints."""
    files = (eight_steps.output / "checkpoint-4").rglob("*")
    size = int(1.5 * sum(path.stat().st_size for path in files if path.is_file()))
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount).returncode:
        pytest.skip("needs root, to mount a small tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow  # a launch; tests/distributed has the same without the Trainer
def test_full_disk_ends_the_run_in_one_line(small_disk: Path, material: Material, tmp_path: Path) -> None:
    output = small_disk / "out"
    flags = material.flags(output, *EIGHT_STEPS, "--save_steps", 2)
    ended = finish(on_two_ranks(CONFIGS / "lift_zero2.json", *flags), tmp_path, fails=True)
    assert ended.code == UNSAVED
    (line,) = re.findall(r"error: .*", ended.text)
    assert f"checkpoint {output}/checkpoint-4 could not be saved: the disk is full" in line
    assert re.search(r"\([\d,]+ bytes are free\)", line)
    assert line.endswith(f"the last whole checkpoint is {output}/checkpoint-2")
    assert "Traceback" not in ended.text
    choice = newest(checkpoints(output))
    assert choice.taken == "checkpoint-2"
    assert list(choice.passed_over) == ["checkpoint-4"]


@pytest.mark.slow  # a launch; tests/distributed has the same without the Trainer
def test_universal_checkpoint_resumes_in_another_stage(
    eight_steps: Finished, material: Material, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    source, target = eight_steps.output / "checkpoint-4", output / "checkpoint-4-universal"
    command = [sys.executable, "-m", "lift_ds.universal", str(source), str(target)]
    converted = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert converted.stdout.startswith(f"{target}: universal checkpoint of {source}, ")
    flags = material.flags(output, *EIGHT_STEPS, "--resume_from_checkpoint", "last")
    ended = finish(on_two_ranks(CONFIGS / "lift_zero3.json", *flags), tmp_path)
    assert [step for step, _ in ended.refreshes()] == [6]
    after, expected = load_like(ended.output, eight_steps.output)
    for name, weight in expected.items():
        torch.testing.assert_close(after[name], weight, atol=1e-6, rtol=0)
