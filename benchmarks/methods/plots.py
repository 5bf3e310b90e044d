"""The plots of a comparison: what is learned against what is forgotten, and what each learning rate gives."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.measure.plots import save_svg
from benchmarks.measure.tables import OK, Row
from benchmarks.methods.cells import COUNT, TUNE
from benchmarks.methods.studies import EXACT_MATCH, TARGET_LOSS, Study, Task
from benchmarks.methods.summary import base_row, results

#: What is forgotten, in the main picture.
_FORGOTTEN = ("general_loss_rise", "rise of the loss on general text")

#: What is learned there, by what decides: column, name, factor.
_LEARNED = {EXACT_MATCH: (EXACT_MATCH, "exact match, %", 100), TARGET_LOSS: (TARGET_LOSS, "loss on the target", 1)}


def draw_all(folder: Path, study: Study, rows: Sequence[Row]) -> list[str]:
    """Draw what there is to draw.

    Args:
        folder: of the pictures.
        study: what is compared.
        rows: of the study.

    Returns:
        The names of the pictures; none without matplotlib.
    """
    if find_spec("matplotlib") is None:
        return []
    pictures = {}
    for task in study.tasks:
        if _tuned(study, task, rows):
            pictures[f"{task.name}_tradeoff.svg"] = _tradeoff(study, task, rows)
            pictures[f"{task.name}_learning_rates.svg"] = _learning_rates(study, task, rows)
    for name, figure in pictures.items():
        save_svg(figure, folder / name)
    return list(pictures)


def _tuned(study: Study, task: Task, rows: Sequence[Row]) -> list[Row]:
    key = (TUNE, task.name, study.tuning_seed, OK)
    found = [row for row in rows if (row["phase"], row["task"], row["seed"], row["status"]) == key]
    return sorted(found, key=lambda row: row["learning_rate"])


def _figure() -> Any:
    from matplotlib.figure import Figure  # here: the numbers do not need it

    return Figure(figsize=(11, 4.5), layout="constrained")


def _colors(study: Study) -> dict[str, Any]:
    from matplotlib import colormaps

    return {method.name: colormaps["tab20"](place) for place, method in enumerate(study.methods)}


def _tradeoff(study: Study, task: Task, rows: Sequence[Row]) -> Any:
    """Left: every learning rate on the validation rows, a line a method. Right: the chosen ones on the test rows."""
    column, title = _FORGOTTEN
    gained, label, factor = _LEARNED[task.decides]
    figure, colors, tuned = _figure(), _colors(study), _tuned(study, task, rows)
    left, right = figure.subplots(1, 2)
    for method in study.methods:
        line = [row for row in tuned if row["method"] == method.name and row[column] is not None]
        forgotten, learned = [row[column] for row in line], [factor * row[gained] for row in line]
        left.plot(forgotten, learned, marker="o", markersize=4, color=colors[method.name], label=method.name)
        for row in line:
            place = (row[column], factor * row[gained])
            left.annotate(f"{row['learning_rate']:g}", place, fontsize=6, xytext=(2, 2), textcoords="offset points")
    for one in (one for one in results(study, rows) if one.task == task):
        forgotten_, learned_ = one.of(column), one.of(gained)
        if forgotten_ is not None and learned_ is not None:
            right.errorbar(
                forgotten_.mean, factor * learned_.mean, xerr=forgotten_.half, yerr=factor * (learned_.half or 0.0),
                marker="o", capsize=2, linestyle="", color=colors[one.method.name],
            )  # fmt: skip
    for axes, phase in ((left, TUNE), (right, COUNT)):
        base = base_row(rows, task.name, phase)
        if base is not None:
            axes.plot(0.0, factor * base[gained], marker="*", color="black", linestyle="")
        axes.set(xlabel=title, ylabel=label)
        if gained == TARGET_LOSS:
            axes.invert_yaxis()  # what is learned points up
        axes.set_xscale("symlog", linthresh=0.01)
        axes.grid(alpha=0.3)
    left.set_title("every learning rate, validation rows")
    right.set_title("chosen learning rates, test rows, 95% intervals")
    left.plot([], [], marker="*", color="black", linestyle="", label="base")
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def _learning_rates(study: Study, task: Task, rows: Sequence[Row]) -> Any:
    figure, colors, tuned = _figure(), _colors(study), _tuned(study, task, rows)
    shown = [("exact_match", "exact match, share"), ("target_loss", "target loss"), _FORGOTTEN]
    shown = shown[task.decides == TARGET_LOSS :]  # which generates no answers here
    panels = figure.subplots(1, len(shown))
    for axes, (column, title) in zip(panels, shown, strict=True):
        for method in study.methods:
            line = [row for row in tuned if row["method"] == method.name and row[column] is not None]
            rates, values = [row["learning_rate"] for row in line], [row[column] for row in line]
            label = method.name if axes is panels[0] else None
            axes.plot(rates, values, marker="o", markersize=4, color=colors[method.name], label=label)
        axes.set(xlabel="learning rate", title=title, xscale="log")
        axes.grid(alpha=0.3)
    panels[-1].set_yscale("symlog", linthresh=0.01)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure
