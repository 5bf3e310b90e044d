"""Pins that the Triton kernel compiles for every GPU and in every form that training can ask for, without a GPU, that
a thread of it needs no memory beside its registers, and that the alignment of a piece asks for no form of its own.

What is compiled is what the functions that train launch: they run to the launch itself. The interpreter, by which the
other tests run the kernel, accepts more than the compiler does.
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
#: Forms of the index, times: block shapes with all pairs of dtypes of gathers and of puts; blocks of one row or column
#: with two pairs, both ways; large storages (piece, values or both) with two block shapes, both ways.
FORMS = 2 * (3 * (16 + 10) + 2 * 2 * 2 + 3 * 2 * 2)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is for Linux alone")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("compiled")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).parent / "compile_kernels.py"), str(folder)]
    subprocess.run(command, env=environment, timeout=300, check=True)
    return {target: json.loads((folder / f"{target}.json").read_text()) for target in TARGETS}


@pytest.mark.parametrize("target", TARGETS)
def test_every_form_of_the_kernel_compiles(compiled: dict[str, dict[str, Any]], target: str) -> None:
    cases = compiled[target]
    assert len(cases) == FORMS
    failed = {case: error for case, error in cases.items() if isinstance(error, str)}
    assert not failed


@pytest.mark.parametrize("target", TARGETS)
def test_a_form_is_compiled_once_however_pieces_are_aligned(compiled: dict[str, dict[str, Any]], target: str) -> None:
    """Only AMD's compiler tells storages of 2 GiB and more from smaller ones, by the instructions that reach them."""
    for case, taken in compiled[target].items():
        of_its_own = target == "gfx942" or not case.endswith(("piece", "values", "both"))
        assert (taken["compiled"], taken["unaligned"]) == (of_its_own, 0), case


@pytest.mark.parametrize("target", TARGETS)
def test_no_form_spills_registers_or_takes_shared_memory(compiled: dict[str, dict[str, Any]], target: str) -> None:
    """So that a GPU runs as many programs at a time as it can hold: on NVIDIA's, 2,048 threads share 65,536 registers.
    Seen are 26 a thread, and 14 on AMD's.
    """
    for case, taken in compiled[target].items():
        if taken["compiled"]:
            assert (taken["spilled"], taken["shared"]) == (0, 0), case
            assert 0 < taken["registers"] <= 32, case
