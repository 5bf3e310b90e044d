"""Pins that the Triton kernel compiles for every GPU and in every form that training can ask for, without a GPU, and
that a thread of it needs no memory beside its registers.

Dtypes and constants are those that triton reads off a launch, and the launch is made by the code that trains. The
interpreter, by which the other tests run the kernel, accepts more than the compiler does.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is for Linux alone")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("compiled")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).parent / "compile_kernels.py")]
    running = [
        subprocess.Popen(
            [*command, target, str(folder / f"{target}.json")],
            env={**environment, "TRITON_CACHE_DIR": str(folder / target)},
        )
        for target in TARGETS
    ]
    assert [process.wait(timeout=300) for process in running] == [0] * len(TARGETS)
    return {target: json.loads((folder / f"{target}.json").read_text()) for target in TARGETS}


@pytest.mark.parametrize("target", TARGETS)
def test_every_form_of_the_kernel_compiles(compiled: dict[str, dict[str, Any]], target: str) -> None:
    cases = compiled[target]
    assert len(cases) == 3 * 2 * 10 * 2  # block shapes, forms of the index, pairs of dtypes, directions
    failed = {case: error for case, error in cases.items() if isinstance(error, str)}
    assert not failed


@pytest.mark.parametrize("target", TARGETS)
def test_no_form_spills_registers_or_takes_shared_memory(compiled: dict[str, dict[str, Any]], target: str) -> None:
    """So that a GPU runs as many programs at a time as it can hold: on NVIDIA's, 2,048 threads share 65,536 registers.
    Seen are 26 a thread, and 9 on AMD's.
    """
    for case, taken in compiled[target].items():
        assert (taken["spilled"], taken["shared"]) == (0, 0), case
        assert 0 < taken["registers"] <= 32, case
