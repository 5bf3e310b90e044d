"""Results of the benchmarks: where they lie, what they have in common, and how budgets are judged."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Record = dict[str, Any]

RESULTS = Path(__file__).parents[1] / "results"


def surroundings(packages: Iterable[str] = ("deepspeed", "transformers", "peft"), **hardware: Any) -> Record:
    """Return what a result depends on beside the code: hardware, versions, date.

    Args:
        packages: whose versions matter.
        **hardware: what is to be said of it beyond processor, cores and memory.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": {
            "cpu": _processor(),
            "cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            **hardware,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,  # says which build it is
            **{package: _version(package) for package in packages},
        },
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_json(path: Path, content: Record) -> None:
    """Write one result file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written to {path}")


def write_results(path: Path, results: Record) -> None:
    """Write the result file of runs on gloo ranks, their surroundings first."""
    write_json(path, {**surroundings(backend="gloo", threads_per_rank=1), **results})


def judged(budget: str, where: str, value: float, limit: float, *, least: bool = False) -> Record:
    """Judge a budget.

    Args:
        budget: what it is about.
        where: configuration that it was measured in.
        value: that was measured.
        limit: that the value may reach.
        least: whether it has to reach it.
    """
    passed = value >= limit if least else value <= limit + 1e-9  # a sum of shares may be above by rounding
    return {"budget": budget, "where": where, "value": value, "limit": limit, "pass": passed}


def print_budgets(budgets: Iterable[Record]) -> None:
    """Print a line for every budget that was judged."""
    for entry in budgets:
        verdict = "pass" if entry["pass"] else "FAIL"
        print(f"{verdict}  {entry['budget']:42} {entry['where']:44} {entry['value']:.4g} of {entry['limit']:.4g}")


def exit_code(budgets: Iterable[Record]) -> int:
    """Return 0, or 1 when a budget is exceeded."""
    return 0 if all(entry["pass"] for entry in budgets) else 1
