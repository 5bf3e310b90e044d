"""Pins down a scaling study on real gloo ranks: every cell of a tiny grid has a row with what was measured, counted and
predicted, bytes on the wire are those of the collectives, nothing runs twice, and a failed cell leaves no process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.scaling.cells import PROBE
from benchmarks.scaling.table import FAILED, OK, read_rows

pytestmark = pytest.mark.slow  # seven ranks import DeepSpeed

STUDY = Path(__file__).parents[2] / "launch" / "scaling_study.py"
TINY = (
    "--hidden 64 --intermediate 176 --layers 2 --vocabulary 64 --sequence 16 --tokens 64 --methods full lift "
    "--scaling weak --steps 2 --repetitions 1 --limit 120"
)
LIMIT = 240


def study(folder: Path, *more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(STUDY), *TINY.split(), "--output", str(folder), *more]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Processes that have a job's folder on their command line."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any(word.startswith(str(folder / "runs")) for word in words):
            found.append(process)
    return found


def test_a_tiny_grid_on_real_ranks(tmp_path: Path) -> None:
    said, _ = (first := study(tmp_path, "--ranks", "1", "2")).communicate(timeout=LIMIT)
    assert first.returncode == 0, said
    rows = read_rows(tmp_path / "measurements.csv")
    ran = [(row["method"], row["ranks"]) for row in rows]
    assert ran == [("full", 1), ("lift", 1), (PROBE, 2), ("full", 2), ("lift", 2)]
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())
    for row in rows:
        assert row["status"] == OK
        assert 0 < row["step_seconds_min"] <= row["step_seconds"] <= row["step_seconds_max"]
    full, lift = rows[3:]
    for row in (full, lift):
        assert row["logical_bytes"] == pytest.approx(row["predicted_logical_bytes"], rel=0.02)
        assert row["peak_bytes"] == pytest.approx(row["predicted_peak_bytes"], rel=0.1)
        assert row["predicted_step_seconds"] > 0
    # Both ranks' bytes pass through one interface, with whatever else the machine sends through it.
    assert full["wire_bytes_sent"] > 0.98 * full["predicted_wire_bytes"]
    assert lift["wire_bytes_sent"] > 0.98 * lift["predicted_wire_bytes"]
    assert lift["trained_parameters"] == pytest.approx(0.05 * full["trained_parameters"], rel=0.01)
    assert lift["refresh_seconds"] > 0
    assert (tmp_path / "report.md").read_text().count("| weak | 1 | 2 |") >= 4

    table = (tmp_path / "measurements.csv").read_bytes()
    said, _ = (again := study(tmp_path, "--ranks", "1", "2")).communicate(timeout=LIMIT)
    assert again.returncode == 0, said
    assert "5 cells, of which 5 are done" in said
    assert (tmp_path / "measurements.csv").read_bytes() == table


def test_a_failed_cell_is_recorded_and_leaves_no_process(tmp_path: Path) -> None:
    running = study(tmp_path, "--ranks", "1", "--methods", "full", "--interface", "absent0")
    said, _ = running.communicate(timeout=LIMIT)
    assert running.returncode == 1, said
    rows = read_rows(tmp_path / "measurements.csv")
    assert [row["status"] for row in rows] == [FAILED]
    assert "rank 0" in rows[0]["error"]
    assert "--interface absent0" in rows[0]["error"]
    assert "--interface absent0" in (tmp_path / "report.md").read_text()
    assert processes_of(tmp_path) == []


def test_a_killed_study_leaves_no_process(tmp_path: Path) -> None:
    running = study(tmp_path, "--ranks", "2", "--methods", "full")
    deadline = time.monotonic() + 60
    while len(processes_of(tmp_path)) < 2:  # a node and a rank
        assert time.monotonic() < deadline
        assert running.poll() is None
        time.sleep(0.1)
    running.send_signal(signal.SIGKILL)
    running.communicate(timeout=30)
    deadline = time.monotonic() + 20
    while left := processes_of(tmp_path):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
