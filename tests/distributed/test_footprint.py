"""Pins down that what benchmarks/footprint.py counts of LIFT on two ranks is what the planner's formulas say: memory
held and bytes sent to 2%, the peak of a step to 5%, with and without activation checkpointing.

A small Llama, so the budgets themselves are left to the benchmark.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SIZES = "--hidden 256 --intermediate 656 --layers 2 --vocabulary 64 --batch 1 --sequence 128"


@pytest.mark.parametrize("more", ["", pytest.param("--checkpointing --vocabulary 1024", marks=pytest.mark.slow)])
def test_counts_agree_with_formulas(more: str, tmp_path: Path) -> None:
    output = tmp_path / "footprint.json"
    command = f"--ranks 2 --stages 2,3 --methods lift {SIZES} {more} --output {output}"  # the last of a flag holds
    command = f"-m benchmarks.footprint {command}"
    result = subprocess.run(
        [sys.executable, *command.split()], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert output.exists(), result.stdout[-4000:] + result.stderr[-4000:]
    found = json.loads(output.read_text())
    assert found["deviations"] == []
    assert [record["stage"] for record in found["records"]] == [2, 3]
    for record in found["records"]:
        assert abs(record["unseen_by_walk"]) < 0.001  # two ways of finding live tensors agree
        assert record["network_total"] > 0
        assert record["peak_formula"] > record["persistent_total"] > 0
        # What a refresh moves beside the new index (ZeRO-3: the old one), stated for a density of 5%.
        assert 0 < record["refresh_carried"] <= 0.15 * record["density"] / 0.05
