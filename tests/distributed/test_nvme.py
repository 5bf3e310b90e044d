"""Pins down that ZeRO-3 with parameters and states on a disk (libaio) trains, refreshes and resumes to the bit like
ZeRO-3 with both on the host.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import rank_environment, run_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not any(Path(folder, "libaio.h").exists() for folder in ("/usr/include", "/usr/local/include")),
        reason="libaio is not installed (Debian: libaio-dev)",
    ),
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    build = "from deepspeed.ops.op_builder import AsyncIOBuilder; AsyncIOBuilder().load()"
    # Once, by one process and with time enough: a build that is cut off leaves a lock behind, and later ones wait.
    subprocess.run([sys.executable, "-c", build], env=rank_environment(1), timeout=1500, check=True)
    return run_ranks("nvme", 2, tmp_path_factory.mktemp("nvme"))


@pytest.mark.parametrize("name", ["nvme", "cut 1", "cut 2", "cut 3", "options", "options, cut 2"])
def test_a_disk_holds_the_same_training_as_the_host(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        expected, found = rank["cpu"], rank[name]
        assert found["losses"] == expected["losses"]
        for kind in ("weights", "indices"):
            assert all(torch.equal(found[kind][key], expected[kind][key]) for key in expected[kind])


def test_weights_and_states_really_were_on_the_disk(ranks: list[dict[str, Any]]) -> None:
    assert not ranks[0]["cpu"]["swapped"]
    assert len(ranks[0]["nvme"]["swapped"]) >= 1
