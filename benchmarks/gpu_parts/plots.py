"""Pictures of what the parts `refresh` and `step` found, from their JSON files alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.measure.plots import save_svg
from benchmarks.measure.records import Record

_COLOURS = {
    "svd": "#7f7f7f", "gram": "#1f77b4", "chebyshev cold": "#2ca02c", "chebyshev warm": "#ff7f0e",
    "full": "#7f7f7f", "lora": "#ff7f0e", "lift": "#1f77b4",
    "dense": "#7f7f7f", "masks": "#9467bd", "published": "#d62728",
}  # fmt: skip
_SOLVERS = ("svd", "gram", "chebyshev cold", "chebyshev warm")
_PHASES = ("dense", "published", "masks", "lift")
_METHODS = ("full", "lora", "lift")

#: A value for each group and series; None where there is none.
_Values = Callable[[str, str], float | None]


def draw(content: Record, path: Path) -> None:
    """Draw the results of one part; part `check` has nothing to draw.

    Args:
        content: of its file.
        path: of the picture, .svg.
    """
    makers = {"refresh": _refresh, "step": _step}
    if content["part"] not in makers or not content["cells"]:
        return
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    makers[content["part"]](figure, content["cells"])
    device = content["hardware"]["device"] or "a CPU, small sizes: no measurement"
    figure.suptitle(f"{device}, {content['date'][:10]}")
    save_svg(figure, path)


def _refresh(figure: Figure, cells: dict[str, Record]) -> None:
    left, right = figure.subplots(1, 2)
    records = [found for entry in cells.values() for found in entry.get("records", ())]
    seconds = {("x".join(map(str, r["shape"])), r["method"]): r["seconds"] for r in records}
    shapes = sorted({shape for shape, _ in seconds}, key=lambda shape: (len(shape), shape))
    _bars(left, shapes, _SOLVERS, lambda shape, method: seconds.get((shape, method)))
    left.set(title="Selecting in one matrix", ylabel="seconds", yscale="log" if records else "linear")
    times = [found for entry in cells.values() for found in entry.get("times", ())]
    for rank in sorted({entry["rank"] for entry in times}):
        of_rank = [entry for entry in times if entry["rank"] == rank]
        sides = [entry["side"] for entry in of_rank]
        (line,) = right.plot(sides, [1e3 * entry["gram"] for entry in of_rank], "--", label=f"gram, r = {rank}")
        chebyshev = [1e3 * entry["chebyshev"] for entry in of_rank]
        right.plot(sides, chebyshev, "o-", color=line.get_color(), label=f"chebyshev, r = {rank}")
    right.set(title="Which solver from which size on", xlabel="shorter side", ylabel="ms")
    if times:
        right.set(xscale="log", yscale="log")
        right.legend(frameon=False, fontsize=8)


def _step(figure: Figure, cells: dict[str, Record]) -> None:
    first, second, third = figure.subplots(1, 3)
    phases = [name for name, entry in cells.items() if "lift_against" in entry]
    _bars(first, phases, _PHASES, lambda name, method: cells[name]["milliseconds"][method])
    first.set(title="Optimizer phase of one layer", ylabel="ms", yscale="log" if phases else "linear")
    runs = {tuple(name.rsplit(": ", 1)): entry for name, entry in cells.items() if "phases" in entry}
    cases = list(dict.fromkeys(case for case, _ in runs))

    def seconds(case: str, method: str) -> float | None:
        return sum(runs[case, method]["phases"]) if (case, method) in runs else None

    def gigabytes(case: str, method: str, *path: str) -> float | None:
        found: Any = runs.get((case, method))
        for key in path:
            found = found and found.get(key)
        return found and found / 1e9

    _bars(second, cases, _METHODS, seconds)
    second.set(title="A training step", ylabel="seconds", yscale="log" if runs else "linear")
    _bars(third, cases, _METHODS, lambda case, method: gigabytes(case, method, "peak_bytes"))
    planned: _Values = lambda case, method: gigabytes(case, method, "planned", "peak_bytes")  # noqa: E731
    _bars(third, cases, _METHODS, planned, outline=True)
    third.set(title="Peak of a step (outline: the planner's)", ylabel="GB", yscale="log" if runs else "linear")


def _bars(axes: Any, groups: list[str], series: tuple[str, ...], value: _Values, *, outline: bool = False) -> None:
    width = 0.8 / len(series)
    for number, name in enumerate(series):
        found = [(place, value(group, name)) for place, group in enumerate(groups)]
        places = [place + (number - (len(series) - 1) / 2) * width for place, height in found if height is not None]
        heights = [height for _, height in found if height is not None]
        style = {"fill": False, "edgecolor": "black"} if outline else {"color": _COLOURS[name], "label": name}
        axes.bar(places, heights, width * 0.92, **style)
    axes.set_xticks(range(len(groups)), [group.replace(", ", "\n") for group in groups], fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    if not outline:
        axes.legend(frameon=False, fontsize=8)
