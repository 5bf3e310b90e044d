"""Pins that the Triton kernel compiles for every GPU and in every form that training can ask for, without a GPU.

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

TARGETS = ("sm_80", "sm_90", "sm_100")

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
    failed = {case: code for case, code in cases.items() if "cubin" not in code}
    assert not failed
