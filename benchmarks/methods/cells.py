"""Cells: the runs of a study, one each. Some follow from others: the counted runs from the learning rate that the
tuning runs choose, and a longer grid from a best rate at its edge.
"""

from __future__ import annotations

import fnmatch
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.measure.tables import OK, Row
from benchmarks.methods.studies import EXACT_MATCH, Method, Study, Task

#: Phases: runs that choose a learning rate, on the validation rows; runs that are compared, on the test rows.
TUNE, COUNT = "tune", "count"

#: What stands for a method in the rows of the model that nothing was trained of.
BASE = "base"


@dataclass(frozen=True)
class Cell:
    """One run.

    Args:
        study: name of it.
        phase: TUNE or COUNT.
        task: name of it.
        method: name of it; BASE: nothing is trained, and the two next are None.
        learning_rate: peak of the schedule.
        seed: of the order of the rows, of adapters, and of a random selection.
    """

    study: str
    phase: str
    task: str
    method: str
    learning_rate: float | None = None
    seed: int | None = None

    @property
    def name(self) -> str:
        """What the files of the run are called, and what a pattern is compared with."""
        rate = "" if self.learning_rate is None else f"-{self.learning_rate:g}-seed{self.seed}"
        return f"{self.phase}-{self.task}-{self.method}{rate}"


def cell_of(row: Row) -> Cell:
    """Return the cell that a row is of."""
    return Cell(**{name: row[name] for name in Cell.__dataclass_fields__})


@dataclass(frozen=True)
class Choice:
    """The learning rate that the tuning runs of a method choose.

    Args:
        rate: the best one.
        edge: "lowest" or "highest" where no rate beyond it was tried, "only" where no other was; empty inside.
    """

    rate: float
    edge: str


def quality(task: Task, row: Row) -> tuple[float, float]:
    """Return what a run is chosen by, the greater the better: exact matches, then the loss; or the loss alone."""
    loss = math.inf if row["target_loss"] is None or math.isnan(row["target_loss"]) else row["target_loss"]
    return (row["exact_match"] or 0.0) if task.decides == EXACT_MATCH else 0.0, -loss


def choose(study: Study, task: Task, method: Method, rows: Sequence[Row]) -> Choice | None:
    """Return the choice of a method on a task; None while runs are missing that could change it, or all failed."""
    rates = rates_of(study, task, method, rows)
    best = _best(task, rates, _tuned(study, task, method, rows))
    if best is None:
        return None
    if len(rates) == 1:
        return Choice(best, "only")
    return Choice(best, {rates[0]: "lowest", rates[-1]: "highest"}.get(best, ""))


def rates_of(study: Study, task: Task, method: Method, rows: Sequence[Row]) -> list[float]:
    """Return the learning rates to try: those of the method, and beyond them as far as the rows so far ask for."""
    rates, found = list(method.learning_rates), _tuned(study, task, method, rows)
    for _ in range(study.extensions):
        best = _best(task, rates, found)
        if best == rates[-1]:
            rates.append(_neighbour(best, 1))
        elif best == rates[0]:
            rates.insert(0, _neighbour(best, -1))
    return rates


def _best(task: Task, rates: Sequence[float], found: Mapping[float, Row]) -> float | None:
    """The rate of the best run; None while a rate has no row, or where all runs failed."""
    ended = [found[rate] for rate in rates if rate in found and found[rate]["status"] == OK]
    if not ended or not found.keys() >= set(rates):
        return None
    rate: float = max(ended, key=functools.partial(quality, task))["learning_rate"]
    return rate


def _neighbour(rate: float, by: int) -> float:
    """Return the rate that comes so many places after another one in the series 1, 3, 10, 30, ..."""
    place = round(2 * math.log10(rate)) + by
    return float(f"{3 if place % 2 else 1}e{place // 2}")


def _tuned(study: Study, task: Task, method: Method, rows: Iterable[Row]) -> dict[float, Row]:
    """The tuning runs of a method on a task that have a row, by learning rate."""
    key = (study.name, TUNE, task.name, method.name, study.tuning_seed)
    names = ("study", "phase", "task", "method", "seed")
    return {row["learning_rate"]: row for row in rows if tuple(row[name] for name in names) == key}


def cells_of(study: Study, rows: Sequence[Row]) -> list[Cell]:
    """Return the cells that are known by now, in the order to run them: the base; the tuning runs and then the counted
    ones of methods with all seeds; the same of methods with fewer.

    Args:
        study: what is compared.
        rows: of the runs so far.
    """
    main = [method for method in study.methods if method.seeds is None]
    further = [method for method in study.methods if method.seeds is not None]
    return [
        *_bases(study),
        *(cell for group in (main, further) for part in (_tuning, _counted) for cell in part(study, group, rows)),
    ]


def _bases(study: Study) -> list[Cell]:
    return [Cell(study.name, phase, task.name, BASE) for task in study.tasks for phase in (TUNE, COUNT)]


def _tuning(study: Study, methods: Sequence[Method], rows: Sequence[Row]) -> list[Cell]:
    return [
        Cell(study.name, TUNE, task.name, method.name, rate, study.tuning_seed)
        for task in study.tasks
        for method in methods
        for rate in rates_of(study, task, method, rows)
    ]


def _counted(study: Study, methods: Sequence[Method], rows: Sequence[Row]) -> list[Cell]:
    chosen = [(task, method, choose(study, task, method, rows)) for task in study.tasks for method in methods]
    return [
        Cell(study.name, COUNT, task.name, method.name, choice.rate, seed)
        for seed in study.counted_seeds  # the outermost, so that what has run at any moment is a comparison
        for task, method, choice in chosen
        if choice is not None and seed in study.counted_seeds[: method.seeds]
    ]


def left_to_do(cells: Iterable[Cell], rows: Iterable[Row], *, retry: bool = False, only: str = "*") -> list[Cell]:
    """Return the cells that have no row yet.

    Args:
        cells: of the study.
        rows: of the runs so far.
        retry: whether to return those too whose run failed.
        only: a pattern of names, as of files; `lift` stands for `*lift*`.
    """
    done = {cell_of(row) for row in rows if row["status"] == OK or not retry}
    pattern = only if any(sign in only for sign in "*?[") else f"*{only}*"
    return [cell for cell in cells if cell not in done and fnmatch.fnmatchcase(cell.name, pattern)]
