"""The plots of a study: efficiency by ranks, and seconds of a step by link; measured beside predicted."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.measure.plots import save_svg
from benchmarks.scaling.cells import METHODS, STRONG, WEAK
from benchmarks.scaling.summary import Scaling, Summary, scalings, summarise
from benchmarks.scaling.table import Row

_COLORS = {"full": "tab:gray", "lora": "tab:orange", "lift": "tab:blue", "lift_node": "tab:cyan"}


def draw_all(folder: Path, rows: Sequence[Row]) -> list[str]:
    """Draw what there is to draw.

    Args:
        folder: of the pictures.
        rows: of the study, predictions filled in.

    Returns:
        The names of the pictures; none without matplotlib.
    """
    if find_spec("matplotlib") is None:
        return []
    found = summarise(rows)
    pictures = {}
    if on_one_node := [one for one in scalings(found) if one.summary.cell.nodes == 1]:
        pictures["efficiency.svg"] = _efficiency(on_one_node)
    if on_links := [one for one in found if one.cell.nodes > 1]:
        pictures["links.svg"] = _links(on_links)
    for name, figure in pictures.items():
        save_svg(figure, folder / name)
    return list(pictures)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # here: the numbers do not need it

    return Figure(figsize=(width, height), layout="constrained")


def _efficiency(found: Sequence[Scaling]) -> Any:
    """A panel for each kind of scaling and stage on one node; a line for each method, its prediction dashed."""
    kinds = [kind for kind in (STRONG, WEAK) if any(one.summary.cell.scaling == kind for one in found)]
    stages = sorted({one.summary.cell.stage for one in found})
    figure = _figure(3.6 * len(stages) + 1, 3 * len(kinds) + 0.5)
    panels = figure.subplots(len(kinds), len(stages), sharex=True, sharey=True, squeeze=False)
    for row, kind in enumerate(kinds):
        for column, stage in enumerate(stages):
            axes = panels[row][column]
            for method in METHODS:
                cells = [(one.summary.cell, one) for one in found]
                if not any(cell.method == method for cell, _ in cells):
                    continue
                line = [one for cell, one in cells if (cell.method, cell.stage, cell.scaling) == (method, stage, kind)]
                line.sort(key=lambda one: one.summary.cell.ranks)
                ranks = [1, *(one.summary.cell.ranks for one in line)]
                measured = [1.0, *(one.efficiency(one.measured) for one in line)]
                axes.plot(ranks, measured, marker="o", color=_COLORS[method], label=method)
                if all(one.predicted for one in line):
                    predicted = [1.0, *(one.efficiency(one.predicted or 0.0) for one in line)]
                    axes.plot(ranks, predicted, marker="x", linestyle="--", color=_COLORS[method])
            axes.set(title=f"{kind}, ZeRO-{stage}", ylim=(0, 1.1))
            axes.set_xticks(sorted({one.summary.cell.ranks for one in found} | {1}))
            axes.grid(alpha=0.3)
    for axes in panels[-1]:
        axes.set_xlabel("ranks")
    for row_of_panels in panels:
        row_of_panels[0].set_ylabel("efficiency")
    panels[0][0].plot([], [], "k--x", label="predicted")
    panels[0][0].legend(fontsize=8)
    return figure


def _links(found: Sequence[Summary]) -> Any:
    """Groups of bars, one for each link, stage, ranks and kind of scaling; crosses are predictions, lines limits."""
    groups: dict[str, dict[str, Summary]] = {}
    for one in found:
        cell = one.cell
        title = f"{cell.link}\nZeRO-{cell.stage}\n{cell.ranks} ranks, {cell.nodes} nodes\n{cell.scaling}"
        groups.setdefault(title, {})[cell.method] = one
    shown = [method for method in METHODS if any(method in group for group in groups.values())]
    width = 0.81 / len(shown)
    figure = _figure(1.8 * len(groups) + 3.5, 4.5)
    axes = figure.subplots()
    for offset, method in enumerate(shown):
        aside = width * (offset - (len(shown) - 1) / 2)
        places = [place + aside for place, group in enumerate(groups.values()) if method in group]
        cells = [group[method] for group in groups.values() if method in group]
        if not cells:
            continue
        seconds = [one.seconds for one in cells]
        spread = [[one.seconds - one.fastest for one in cells], [one.slowest - one.seconds for one in cells]]
        axes.bar(places, seconds, 0.93 * width, yerr=spread, capsize=2, color=_COLORS[method], label=method)
        for place, one in zip(places, cells, strict=True):
            if one.predicted:
                axes.plot(place, one.predicted, "kx", markersize=7)
            if one.limit:
                axes.hlines(one.limit, place - 0.45 * width, place + 0.45 * width, color="red")
            axes.text(place, one.slowest * 1.08, f"{one.seconds:.2f}", ha="center", fontsize=8)
    axes.plot([], [], "kx", label="predicted")
    axes.plot([], [], color="red", label="bytes on the wire / rate")
    axes.set_xticks(range(len(groups)), list(groups), fontsize=8)
    axes.set(yscale="log", ylabel="seconds of a step")
    figure.legend(loc="outside right upper", fontsize=8)
    return figure
