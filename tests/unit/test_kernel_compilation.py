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

#: One of each maker; the others with the slow tests.
TARGETS = [*("sm_90", "gfx942"), *(pytest.param(target, marks=pytest.mark.slow) for target in ("sm_80", "sm_100"))]
#: Forms of the index, times: block shapes with all pairs of dtypes of gathers and of puts; blocks of one row or column
#: with two pairs, both ways; large storages (piece, values or both) with two block shapes, both ways.
FORMS = 2 * (3 * (16 + 10) + 2 * 2 * 2 + 3 * 2 * 2)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is for Linux alone")


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each of the targets of this run gave; they compile side by side."""
    here = [item for item in request.session.items if isinstance(item, pytest.Function) and item.path == request.path]
    targets = sorted({item.callspec.params["target"] for item in here})
    folder = tmp_path_factory.mktemp("compiled")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).parent / "compile_kernels.py"), str(folder), *targets]
    subprocess.run(command, env=environment, timeout=300, check=True)
    return {target: json.loads((folder / f"{target}.json").read_text()) for target in targets}


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
