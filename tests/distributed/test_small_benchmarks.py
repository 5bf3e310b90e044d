"""Pins down that benchmarks which no other test runs do run, on real gloo ranks, within the budgets that do not depend
on the speed of the machine: memory of a layer, the work of a refresh, the weights that it moves.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
SMALL = {
    "decoder_layer": "--hidden 256 --intermediate 896 --heads 4 --key-value-heads 1",
    "refresh_ranks": "--rounds 1 --ranks 2 --stages 3 --matrices 4 --rows 128 --columns 256 --lra_rank 16",
}


@pytest.mark.parametrize("name", SMALL)
def test_a_small_one_runs_within_its_budgets(name: str, tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    command = f"-m benchmarks.{name} {SMALL[name]} --output {output}"
    result = subprocess.run(
        [sys.executable, *command.split()], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    budgets = json.loads(output.read_text())["budgets"]
    assert len(budgets) > 1
    assert all(budget["pass"] for budget in budgets)
