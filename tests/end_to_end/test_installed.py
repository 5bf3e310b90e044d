"""A wheel built from the repository holds all that is needed: installed in a folder, it plans and trains far from here.

What it depends on is that of the present environment. The commands run in an empty folder, and the repository is on
no path.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from launches import BIN, REPOSITORY
from saved import load

pytestmark = pytest.mark.slow

#: What a wheel is built from.
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "lift_ds")

#: Seconds for a command; the longest builds the small base model.
LIMIT = 540

Run = Callable[..., str]


def run(command: Sequence[object], folder: Path, **variables: str) -> str:
    """Run a command in a folder to its end, and return what it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **variables}
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the installed wheel."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    # From a copy: a build beside the sources would take in what an earlier one left there.
    for name in SOURCES:
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(REPOSITORY / name, source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    run([*pip, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", built, "."], source)
    (wheel,) = built.glob("*.whl")
    folder = tmp_path_factory.mktemp("site")
    run([*pip, "install", "--no-deps", "--no-index", "--target", folder, wheel], built)
    return folder


@pytest.fixture
def run_installed(site: Path, tmp_path: Path) -> Run:
    """Runs a command of the installed package in an empty folder."""
    variables = {
        "PYTHONPATH": str(site),
        "PATH": os.pathsep.join(map(str, (site / "bin", BIN, os.environ["PATH"]))),
        "LIFT_DS_CACHE": str(tmp_path / "cache"),
    }
    return lambda *command: run(command, tmp_path, **variables)


def test_package_and_kernel_are_those_of_the_wheel(site: Path, run_installed: Run) -> None:
    imports = "import lift_ds; from lift_ds.index.kernels import _host; print(lift_ds.__file__, _host.__file__)"
    package, kernel = map(Path, run_installed(sys.executable, "-c", imports).splitlines()[-1].split())
    assert package == site / "lift_ds" / "__init__.py"
    assert kernel.is_relative_to(site)


def test_it_plans(run_installed: Run) -> None:
    assert "LIFT" in run_installed("lift-ds", "plan", "--model", "7B")


def test_every_way_to_start_it_is_the_same_job(run_installed: Run) -> None:
    ways = (
        ("lift-ds", "train"),
        (sys.executable, "-m", "lift_ds.training"),
        ("deepspeed", "--num_accelerators", 1, "--module", "lift_ds.training"),
    )
    told = {tuple(re.findall(r"^  (--\w+)", run_installed(*way, "--help"), re.MULTILINE)) for way in ways}
    (flags,) = told
    assert "--density" in flags


def test_it_trains_in_one_process(run_installed: Run, tmp_path: Path) -> None:
    said = run_installed("lift-ds", "train", "--output_dir", "tuned", "--max_steps", 5)
    assert "saved to tuned: a plain Hugging Face model" in said
    assert load(tmp_path / "tuned").num_parameters() > 0
