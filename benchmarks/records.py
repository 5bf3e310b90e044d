"""Result files of the benchmarks: where they lie, what they say about the machine they come from."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"

Record = dict[str, Any]


def surroundings(packages: Iterable[str], **hardware: Any) -> Record:
    """What a result depends on beside the code: hardware, versions, date.

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
            **{package: version(package) for package in packages},
        },
    }


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


def print_budgets(budgets: Iterable[Record]) -> None:
    """Print a line for every budget that was judged."""
    for entry in budgets:
        verdict = "pass" if entry["pass"] else "FAIL"
        print(f"{verdict}  {entry['budget']:42} {entry['where']:44} {entry['value']:.4g} of {entry['limit']:.4g}")
