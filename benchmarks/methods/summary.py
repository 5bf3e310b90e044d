"""The counted runs of a study put together: means over the seeds with their intervals, and differences by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scipy.stats import t as student

from benchmarks.measure.tables import OK, Row
from benchmarks.methods.cells import BASE, COUNT, Choice, choose
from benchmarks.methods.studies import Method, Study, Task

#: Share of repetitions of a study in which such an interval would hold the true mean, if runs scatter normally.
CONFIDENCE = 0.95

#: Share by which the losses of a first step may differ from method to method. Nothing is trained yet, so that the same
#: rows have the same loss, to the precision of training.
SAME_LOSS = 0.01

#: Column -> how it is called. The first is what is learned, those from the third on what is forgotten.
MEASURES = {
    "exact_match": "exact match, %",
    "target_loss": "target loss",
    "general_loss_rise": "rise of general loss",
    "divergence": "KL from the base",
    "commonsense": "commonsense, %",
}

#: Columns that are shown as a percentage.
SHARES = ("exact_match", "commonsense")


@dataclass(frozen=True)
class Estimate:
    """A mean.

    Args:
        mean: of the values.
        half: half the width of its interval; None for a single value.
        count: how many values.
    """

    mean: float
    half: float | None
    count: int


def estimate(values: Sequence[float]) -> Estimate | None:
    """Return the mean of some values with its confidence interval by Student's t; None without values."""
    count = len(values)
    if count == 0:
        return None
    mean = statistics.fmean(values)
    if count == 1:
        return Estimate(mean, None, 1)
    quantile = float(student.ppf((1 + CONFIDENCE) / 2, count - 1))
    return Estimate(mean, quantile * statistics.stdev(values) / math.sqrt(count), count)


@dataclass(frozen=True)
class Result:
    """The counted runs of a method on a task.

    Args:
        task: what was learned.
        method: by what.
        choice: the learning rate.
        by_seed: seed -> row.
    """

    task: Task
    method: Method
    choice: Choice
    by_seed: dict[int, Row]

    def of(self, column: str) -> Estimate | None:
        """Return the mean of a column over the seeds; None where nothing was measured."""
        return estimate([row[column] for row in self.by_seed.values() if row[column] is not None])


def results(study: Study, rows: Sequence[Row]) -> list[Result]:
    """Return what each method with counted runs reached on each task.

    Args:
        study: what is compared.
        rows: of the runs so far; those of another rate than the chosen one, and of other seeds, do not count.
    """
    found = []
    for task in study.tasks:
        for method in study.methods:
            choice = choose(study, task, method, rows)
            if choice is None:
                continue
            key = (study.name, COUNT, task.name, method.name, choice.rate, OK)
            names = ("study", "phase", "task", "method", "learning_rate", "status")
            by_seed = {
                row["seed"]: row
                for row in rows
                if tuple(row[name] for name in names) == key and row["seed"] in study.counted_seeds
            }
            if by_seed:
                found.append(Result(task, method, choice, dict(sorted(by_seed.items()))))
    return found


def difference(one: Result, other: Result, column: str) -> Estimate | None:
    """Return how much more a method has than another one, over the seeds that both have; None where there are none."""
    return estimate(
        [
            one.by_seed[seed][column] - other.by_seed[seed][column]
            for seed in one.by_seed.keys() & other.by_seed.keys()
            if one.by_seed[seed][column] is not None and other.by_seed[seed][column] is not None
        ]
    )


def base_row(rows: Iterable[Row], task: str, phase: str) -> Row | None:
    """Return the row of the model that nothing was trained of; None where it was not evaluated."""
    wanted = (BASE, task, phase, OK)
    return next((r for r in rows if (r["method"], r["task"], r["phase"], r["status"]) == wanted), None)


def with_rises(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with the rise of their loss on general text filled in, against the base of their study."""
    bases = {(r["study"], r["task"], r["phase"]): r["general_loss"] for r in rows if r["method"] == BASE}

    def rise(row: Row) -> float | None:
        base = bases.get((row["study"], row["task"], row["phase"]))
        return None if base is None or row["general_loss"] is None else row["general_loss"] - base

    return [row | {"general_loss_rise": rise(row)} for row in rows]


def unequal_starts(rows: Iterable[Row]) -> list[str]:
    """Return the tasks and seeds whose methods did not begin with the same loss, each as a sentence."""
    losses: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        if row["first_loss"] is not None:
            losses.setdefault((row["task"], row["seed"]), {})[row["method"]] = row["first_loss"]
    return [
        f"Task {task}, seed {seed}: the losses of the first step differ, from {min(found.values()):.4f} to "
        f"{max(found.values()):.4f}, so that the methods did not see the same rows."
        for (task, seed), found in losses.items()
        if max(found.values()) > (1 + SAME_LOSS) * min(found.values())
    ]
