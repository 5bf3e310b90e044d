"""Pins down that `make gpu` runs where there is no device, small and on the host: each part to its end, with no check
failed; that a run which was killed, or whose time was up, goes on and repeats nothing; and that it says what it is not.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from harness import WORKERS, rank_environment

from benchmarks import gpu
from benchmarks.gpu_parts.cells import FAILED, PASSED, SKIPPED

REPOSITORY = Path(__file__).parents[2]
LIMIT_SECONDS = 300

#: Checks that have nothing to look at on this host; fp16 trains on some.
SKIPPED_ON_A_HOST = {"waiting: a step does not wait for the device"}
MAY_BE_SKIPPED = {"FlashAttention, package flash_attn", *(f"overflow: fp16, ZeRO-{stage}" for stage in (2, 3))}


def command(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--output", str(folder), *arguments]


def run(folder: Path, *arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        command(folder, *arguments), cwd=REPOSITORY, env=rank_environment(1), capture_output=True, text=True,
        timeout=LIMIT_SECONDS, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def results(folder: Path, part: str) -> dict[str, Any]:
    (path,) = folder.glob(f"cpu-*-{part}.json")
    return json.loads(path.read_text())


def kill_after_a_cell(folder: Path, part: str) -> dict[str, Any]:
    """Start a part, kill it when a cell is done, and return the cells there are then."""
    running = subprocess.Popen(
        command(folder, "--parts", part), cwd=REPOSITORY, env=rank_environment(1), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + LIMIT_SECONDS
    while not any(json.loads(path.read_text())["cells"] for path in folder.glob(f"*-{part}.json")):
        assert time.monotonic() < deadline, "no cell was ever done"
        assert running.poll() is None, f"ended with {running.returncode} before a cell was done"
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait(LIMIT_SECONDS)
    time.sleep(0.5)  # its processes end with it
    return results(folder, part)["cells"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One part killed, then continued for no time, then all parts to the end, then once more; and what each left."""
    folder = tmp_path_factory.mktemp("gpu")
    found: dict[str, Any] = {"folder": folder, "killed": kill_after_a_cell(folder, "refresh")}
    found["stopped"] = run(folder, "--parts", "refresh", "--budget_seconds", "0")
    found["stopped at"] = results(folder, "refresh")
    found["whole"] = run(folder)
    found["parts"] = {part: results(folder, part) for part in gpu.PARTS}
    found["again"] = gpu.main(["--device", "cpu", "--output", str(folder)])  # starts no process
    found["parts again"] = {part: results(folder, part) for part in gpu.PARTS}
    return found


def test_every_part_comes_to_its_end(runs: dict[str, Any]) -> None:
    code, said = runs["whole"]
    assert code == 0, said[-6000:]
    for part, content in runs["parts"].items():
        cells = {cell.name for batch in gpu.part_of(part).batches("cpu", True) for cell in batch.cells}
        assert content["cells"].keys() == cells
        assert content["finished"]
        assert content["under_way"] is None
        assert content["sizes"] == "small"
        assert {"torch", "triton", "deepspeed", "transformers", "cuda"} <= content["versions"].keys()


def test_no_check_failed_and_none_was_left_out_without_need(runs: dict[str, Any]) -> None:
    for content in runs["parts"].values():
        assert [name for name, entry in content["cells"].items() if entry["state"] == FAILED] == []
    checks = runs["parts"]["check"]["cells"]
    skipped = {name for name, entry in checks.items() if entry["state"] == SKIPPED}
    assert SKIPPED_ON_A_HOST <= skipped <= SKIPPED_ON_A_HOST | MAY_BE_SKIPPED
    assert all(checks[name]["reason"] for name in skipped)


def test_a_killed_run_goes_on_and_so_does_one_whose_time_was_up(runs: dict[str, Any]) -> None:
    killed, stopped, whole = runs["killed"], runs["stopped at"], runs["parts"]["refresh"]["cells"]
    assert killed, "no cell was done before the run was killed"
    assert all(stopped["cells"][name] == entry for name, entry in killed.items())
    if len(stopped["cells"]) < len(whole):
        assert not stopped["finished"]
        assert runs["stopped"][0] == gpu.UNFINISHED, runs["stopped"][1]
        assert "give the same command again" in runs["stopped"][1]
    assert all(whole[name] == entry for name, entry in stopped["cells"].items())


def test_what_is_done_is_not_done_again(runs: dict[str, Any]) -> None:
    assert runs["again"] == 0
    for part, content in runs["parts"].items():
        assert runs["parts again"][part]["cells"] == content["cells"]


def test_nothing_claims_to_be_a_measurement(runs: dict[str, Any]) -> None:
    assert "no figure of it is a measurement" in runs["whole"][1]
    for content in runs["parts"].values():
        assert content["hardware"]["device"] is None
        assert content["budgets"] == []


def test_plots_are_drawn_from_the_files(runs: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    drawn = list(runs["folder"].glob("*.svg"))
    assert len(drawn) == 2
    for picture in drawn:
        picture.unlink()
    assert gpu.main(["--plots_only", "--output", str(runs["folder"])]) == 0
    assert sorted(runs["folder"].glob("*.svg")) == sorted(drawn)


def test_results_have_states_that_a_run_can_go_on_from(runs: dict[str, Any]) -> None:
    states = {entry["state"] for content in runs["parts"].values() for entry in content["cells"].values()}
    assert states == {PASSED, SKIPPED}


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two runs left of cells that go well, fail, end their process and hang."""
    folder = tmp_path_factory.mktemp("cells")
    done = subprocess.run(
        [sys.executable, str(WORKERS / "gpu_cells.py"), str(folder)], cwd=REPOSITORY, env=rank_environment(1),
        capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.slow
def test_no_cell_stops_the_others(faults: list[dict[str, Any]]) -> None:
    cells = faults[0]["cells"]
    states = {name: entry["state"] for name, entry in cells.items()}
    bad = dict.fromkeys(("fails", "crashes", "hangs"), FAILED)
    assert states == {"first": PASSED, "skips": SKIPPED, "last": PASSED, **bad}
    assert "illegal memory access" in cells["fails"]["message"]
    assert cells["fails"]["traceback"]
    assert "ended with 11: the last words" in cells["crashes"]["message"]
    assert cells["hangs"]["message"] == "not done within 0.8 s"
    assert cells["skips"]["reason"] == "not on this machine"


@pytest.mark.slow
def test_after_a_crash_the_rest_have_a_fresh_process(faults: list[dict[str, Any]]) -> None:
    cells = faults[0]["cells"]
    assert cells["first"]["process"] != cells["last"]["process"]


@pytest.mark.slow
def test_what_runs_when_the_time_is_up_has_not_failed(faults: list[dict[str, Any]]) -> None:
    late = faults[2]
    assert late["cells"] == {}
    assert late["interrupted"] == ["late"]
    assert late["under_way"] is None


@pytest.mark.slow
def test_what_failed_is_tried_again_and_nothing_else(faults: list[dict[str, Any]]) -> None:
    assert faults[0]["begun"] == ["first", "fails", "crashes", "hangs", "last"]
    assert faults[1]["begun"] == ["fails", "crashes", "hangs"]
    for name in ("first", "skips", "last"):
        assert faults[1]["cells"][name] == faults[0]["cells"][name]
