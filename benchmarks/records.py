"""Result files of the benchmarks: where they lie, and what they have in common."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from lift_ds.study.surroundings import Record, surroundings

__all__ = ["RESULTS", "Record", "print_budgets", "surroundings", "write_json"]

RESULTS = Path(__file__).parent / "results"


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
