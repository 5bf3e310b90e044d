"""Part `check`: does LIFT do on this device what it is to do?

kernels, parity with Algorithm 1, steps that overflow, resuming, the watchdog, torch.compile, FlashAttention. A check
that fails says why, and does not stop the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from benchmarks.gpu_parts import kernels, model_features, stalls, training
from benchmarks.gpu_parts.cells import FAILED, PASSED, SKIPPED, Batch
from benchmarks.measure.records import Record

IMPORTS = ("deepspeed", "lift_ds.zero.engine", "transformers.models.llama.modeling_llama", "torch._dynamo")


def batches(device: str, small: bool) -> list[Batch]:
    """Return the checks, in as few processes as will do."""
    alone = [*kernels.cells(small), *training.plain_cells(), *model_features.cells()]
    return [Batch(alone), training.batch(), stalls.batch(), model_features.precision_batch(small)]


def report(cells: dict[str, Record], *, measured: bool) -> str:
    """Return how many checks passed, and which did not."""
    states = Counter(entry["state"] for entry in cells.values())
    rows = [", ".join(f"{states[state]} {state}" for state in (PASSED, FAILED, SKIPPED))]
    for name, entry in cells.items():
        if entry["state"] == SKIPPED:
            rows.append(f"skipped  {name}: {entry['reason']}")
    return "\n".join([*rows, *_failures(cells)])


def _failures(cells: dict[str, Record]) -> Iterator[str]:
    """Yield the lines about checks that failed; what several have in common once."""
    before = None
    for name, entry in cells.items():
        if entry["state"] == FAILED:
            first, *more = entry["message"].splitlines()
            yield f"FAILED   {name}: {first}"
            details = [*more, *entry.get("traceback", ())]
            if details != before:
                yield from ("    " + line for line in details)
            before = details


def conclude(cells: dict[str, Record]) -> Record:
    """Nothing follows from the checks together."""
    return {}


def budgets(cells: dict[str, Record]) -> list[Record]:
    """No check has a budget: it passes or fails."""
    return []
