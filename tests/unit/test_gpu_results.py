"""Pins down what benchmarks/gpu.py makes of its results: which file a run goes on with, that each goal can be missed,
and that the sizes it finds for solver="auto" are those from which the one solver is faster in what was measured.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.gpu_parts import machine, refresh, step
from benchmarks.gpu_parts.book import Book, open_book
from benchmarks.gpu_parts.cells import FAILED, PASSED, Cell


def surroundings(date: str = "2026-11-21", torch: str = "2.13.0", sizes: str = "full") -> dict[str, Any]:
    return {
        "date": f"{date}T10:00:00+00:00",
        "hardware": {"device": "NVIDIA H200", "driver": "580.1", "cpu": "any"},
        "versions": {"torch": torch},
        "sizes": sizes,
    }


def opened(folder: Path, **changes: str) -> Book:
    around = surroundings(**changes)
    return open_book(folder, "check", machine.slug(around), around)


@pytest.mark.parametrize(
    ("device", "name"),
    [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100-80gb-hbm3"), ("AMD Instinct MI300X", "mi300x")],
)
def test_files_are_named_by_the_device(device: str, name: str) -> None:
    assert machine.slug({"hardware": {"device": device}, "sizes": "full"}) == name
    assert machine.slug({"hardware": {"device": device}, "sizes": "small"}) == f"{name}-small"
    assert machine.slug({"hardware": {"device": None}, "sizes": "small"}) == "cpu"


def test_a_run_goes_on_with_what_is_unfinished_and_with_what_is_of_today(tmp_path: Path) -> None:
    first = opened(tmp_path)
    assert first.path.name == "h200-2026-11-21-check.json"
    assert opened(tmp_path, date="2026-11-22").path == first.path
    first.update(finished=True)
    assert opened(tmp_path).path == first.path
    assert opened(tmp_path, date="2026-11-22").path.name == "h200-2026-11-22-check.json"


@pytest.mark.parametrize("changed", [{"torch": "2.14.0"}, {"sizes": "half"}])
def test_results_of_other_versions_or_sizes_stand_in_a_file_of_their_own(
    tmp_path: Path, changed: dict[str, str]
) -> None:
    first = opened(tmp_path)
    other = opened(tmp_path, **changed)
    assert other.path.name == "h200-2026-11-21-2-check.json"
    assert opened(tmp_path).path == first.path
    assert opened(tmp_path, **changed).path == other.path


def test_what_went_wrong_before_comes_last(tmp_path: Path) -> None:
    book = opened(tmp_path)
    cells = [Cell(name, lambda device: {}) for name in ("failed", "done", "ended a run", "new")]
    book.end("failed", FAILED, 1.0, {"message": ""})
    book.end("done", PASSED, 1.0, {})
    book.begin("ended a run")
    again = Book(book.path)
    again.note_interruption()
    assert [cell.name for cell in again.left(cells)] == ["new", "failed", "ended a run"]
    assert json.loads(book.path.read_text())["under_way"] is None


def test_the_exit_code_tells_a_failure_from_a_run_that_is_not_at_its_end() -> None:
    done: dict[str, Any] = {"cells": {"one": {"state": PASSED}}, "budgets": [], "finished": True}
    assert gpu.exit_code([done]) == 0
    assert gpu.exit_code([done, done | {"finished": False}]) == gpu.UNFINISHED
    assert gpu.exit_code([done | {"cells": {"one": {"state": FAILED}}, "finished": False}]) == gpu.MISSED
    assert gpu.exit_code([done | {"budgets": [{"pass": False}]}]) == gpu.MISSED


@pytest.mark.parametrize("crossing", [lambda rank: 512, lambda rank: 10 * rank, lambda rank: max(512, 8 * rank)])
def test_the_crossover_is_where_the_solvers_are_equally_fast(crossing: Any) -> None:
    times = [
        {"rank": rank, "side": side, "gram": 1e-9 * side**3, "chebyshev": 1e-9 * crossing(rank) * side**2}
        for rank in (16, 32, 64, 128)
        for side in refresh._SIDES
        if side >= 3 * rank
    ]
    pair = refresh.fit(times)
    assert pair is not None
    for entry in times:
        chosen = "chebyshev" if entry["side"] >= max(pair[0] * entry["rank"], pair[1]) else "gram"
        assert entry[chosen] == pytest.approx(min(entry["gram"], entry["chebyshev"]))


def selecting(method: str, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "method": method, "shape": [4096, 11008], "seconds": 0.05, "overlap": 0.999, "peak_bytes": 9,
        "estimated_bytes": 9,
    }  # fmt: skip
    return {"records": [{**values, **changes}]}


def missed(budgets: list[dict[str, Any]]) -> list[str]:
    return [entry["budget"] for entry in budgets if not entry["pass"]]


def test_each_goal_of_refresh_can_be_missed() -> None:
    good = {
        "svd": selecting("svd", seconds=10.0),
        "warm": selecting("chebyshev warm"),
        "round": {"chebyshev warm": {"seconds": 7.9}},
    }
    assert len(refresh.budgets(good)) == 6
    assert missed(refresh.budgets(good)) == []
    slow = good | {"svd": selecting("svd", seconds=4.9)}
    assert missed(refresh.budgets(slow)) == ["times faster than the full SVD, at least"]
    off = good | {"warm": selecting("chebyshev warm", overlap=0.99)}
    assert missed(refresh.budgets(off)) == ["off the selection of float64, at most"]
    large = good | {"warm": selecting("chebyshev warm", peak_bytes=10)}
    assert missed(refresh.budgets(large)) == ["peak beside the estimate, at most"]
    late = good | {"round": {"chebyshev warm": {"seconds": 8.1}}}
    assert missed(refresh.budgets(late)) == ["seconds of a round, at most"]
    assert refresh.budgets({"round": {"state": FAILED}}) == []


def trained(seconds: float, peak: int, planned: int = 100) -> dict[str, Any]:
    return {"seconds_of_steps": [seconds] * 3, "peak_bytes": peak, "planned": {"peak_bytes": planned}}


def test_each_goal_of_step_can_be_missed() -> None:
    good = {
        "phase": {"dtype": "bfloat16", "lift_against": {"dense": 0.19}},
        "7B: full": trained(2.0, 500, 500),
        "7B: lora": trained(1.0, 100),
        "7B: lift": trained(1.9, 99),
    }
    assert len(step.budgets(good)) == 6
    assert missed(step.budgets(good)) == []
    dense = good | {"phase": {"dtype": "bfloat16", "lift_against": {"dense": 0.21}}}
    assert missed(step.budgets(dense)) == ["dense over LIFT, at least"]
    assert missed(step.budgets(good | {"7B: lift": trained(2.1, 99)})) == ["step over full fine-tuning's, at most"]
    assert missed(step.budgets(good | {"7B: lift": trained(1.9, 101)})) == ["peak over LoRA's, at most"]
    assert missed(step.budgets(good | {"7B: lift": trained(1.9, 94)})) == ["peak off the planner's, at most"]
    without_full = {name: entry for name, entry in good.items() if name != "7B: full"}
    assert len(step.budgets(without_full)) == 4
