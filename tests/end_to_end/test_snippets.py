"""Pins that the Python that README and docs show runs as it stands there, and that each training in it moves a
twentieth of the managed entries and nothing else, and saves a plain model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from launches import finish
from pages import blocks

BLOCKS = [str(block) for block in blocks("python")]

#: Blocks that train nothing.
NOT_TRAINING = {
    "docs/your_own_script.md:config", "docs/evaluation.md:evaluate", "docs/settings.md:criterion",
    "docs/deltas.md:deltas",
}  # fmt: skip

#: Blocks that save what they have trained.
SAVING = {f"docs/your_own_script.md:{name}" for name in ("trainer", "accelerate", "deepspeed", "plain")}


def test_each_block_has_a_name_of_its_own() -> None:
    assert not [str(block) for block in blocks("python") if block.name is None]
    assert len(set(BLOCKS)) == len(BLOCKS)
    assert set(BLOCKS) >= SAVING


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """How each of the blocks ended."""
    folder = tmp_path_factory.mktemp("snippets")
    finish([sys.executable, str(Path(__file__).parent / "snippets.py"), str(folder)], folder, limit=400)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("block", BLOCKS)
def test_it_runs_and_trains_a_twentieth(block: str, results: dict[str, dict[str, Any]]) -> None:
    result = results[block]
    assert result["code"] == 0, result["output"]
    trained = result["trained"]
    if not trained:
        assert block in NOT_TRAINING
        return
    # k is rounded to a whole number in each matrix.
    assert trained["share"] == pytest.approx(0.05, abs=0.0005)
    assert trained["others"] == 0
    assert trained["keys"]
    assert trained["saved"] == (block in SAVING)
