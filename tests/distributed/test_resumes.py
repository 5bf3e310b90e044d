"""Pins down that a resume continues to the bit in every ZeRO stage, on the device and with offloaded states.

Cut before, at and after the refresh of the third of seven steps. `test_behaviour.py` has some of these resumes,
`test_nvme.py` those of states on a disk.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import run_ranks

pytestmark = pytest.mark.slow

KINDS = [f"stage {stage}" for stage in range(4)] + [f"bf16 stage {stage}" for stage in (1, 2, 3)]
KINDS += ["offload stage 2", "offload stage 3"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks("resumes", 2, tmp_path_factory.mktemp("resumes"))


CASES = [(kind, cut) for kind in KINDS for cut in (2, 3, 4)]
OF_CRITERIA = [(kind, 2) for kind in ("random stage 2", "smallest stage 3", "gradient stage 2", "gradient stage 3")]


@pytest.mark.parametrize(("kind", "cut"), [*CASES, *OF_CRITERIA])
def test_a_resume_continues_to_the_bit(ranks: list[dict[str, Any]], kind: str, cut: int) -> None:
    for rank in ranks:
        expected, found = rank[f"{kind} after {cut}"]["expected"], rank[f"{kind} after {cut}"]["found"]
        assert found["losses"] == expected["losses"]
        for what in ("weights", "indices"):
            assert all(torch.equal(found[what][name], expected[what][name]) for name in expected[what])
