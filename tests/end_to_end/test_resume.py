"""A run that stops and resumes from its checkpoint ends in the weights of one that did not stop, to the bit.

Eight steps with the checkpoint at the fourth and refreshes after the third and the sixth, so the resumed run has to
take over the selection, the moments, the schedule, the order of the data and the place in the refresh interval.
Equal to the bit, because nothing but the process is another: same ranks, same batches, same order of sums.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launches import CONFIGS, Finished, finish, on_two_ranks
from material import EIGHT_STEPS, Material
from saved import load_like


def check_resumed(config: str, whole: Finished, material: Material, folder: Path) -> None:
    """Resume from the fourth step of a whole run and compare the ends."""
    flags = material.flags(folder / "out", *EIGHT_STEPS, "--resume_from_checkpoint", whole.output / "checkpoint-4")
    resumed = finish(on_two_ranks(CONFIGS / config, *flags), folder)
    assert [step for step, _ in whole.refreshes()] == [3, 6]
    assert [step for step, _ in resumed.refreshes()] == [6]
    after, expected = load_like(resumed.output, whole.output)
    assert [name for name in expected if not torch.equal(after[name], expected[name])] == []


def test_zero2_resumes_to_the_bit(eight_steps: Finished, material: Material, tmp_path: Path) -> None:
    check_resumed("lift_zero2.json", eight_steps, material, tmp_path)


@pytest.mark.slow  # a launch of its own
def test_resuming_at_the_end_takes_no_step_more(eight_steps: Finished, material: Material, tmp_path: Path) -> None:
    """As after a kill between the last checkpoint and the end; a ninth step would bring a refresh and a loss."""
    flags = material.flags(
        tmp_path / "out", *EIGHT_STEPS, "--resume_from_checkpoint", eight_steps.output / "checkpoint-8"
    )
    resumed = finish(on_two_ranks(CONFIGS / "lift_zero2.json", *flags), tmp_path)
    assert resumed.refreshes() == []
    assert "{'loss': " not in resumed.stdout
    after, expected = load_like(resumed.output, eight_steps.output)
    assert [name for name in expected if not torch.equal(after[name], expected[name])] == []


@pytest.mark.slow  # two more launches, of the stage whose state access differs; tests/distributed resumes it too
def test_zero3_resumes_to_the_bit(material: Material, tmp_path: Path) -> None:
    config = "lift_zero3.json"
    flags = material.flags(tmp_path / "whole" / "out", *EIGHT_STEPS)
    whole = finish(on_two_ranks(CONFIGS / config, *flags), tmp_path / "whole")
    check_resumed(config, whole, material, tmp_path)
