"""The plot of benchmarks/refresh.py: seconds by shape and method, and the share off the exact selection by matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from records import Record

#: A selection that is exact has no place on a logarithmic axis: it is drawn here.
_LEAST = 1e-6

_COLOURS = {
    "baseline": "#7f7f7f",
    "svd_lowrank": "#d62728",
    "gram": "#1f77b4",
    "chebyshev cold": "#2ca02c",
    "chebyshev warm": "#ff7f0e",
}


def draw(records: list[Record], path: Path) -> None:
    """Draw both panels.

    Args:
        records: as `selecting.record` makes them.
        path: of the file, .svg.
    """
    records = [r for r in records if r["seconds"] is not None]  # of the largest matrix memory alone is counted
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _seconds(left, records)
    _off(right, records)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "lift_ds"}):  # the same numbers give the same file
        figure.savefig(path, metadata={"Date": None})
    print(f"drawn to {path}")


def _seconds(axes: Any, records: list[Record]) -> None:
    first = records[0]["matrix"]
    same = [r for r in records if r["matrix"] == first]
    shapes = list(dict.fromkeys("x".join(map(str, r["shape"])) for r in same))
    _bars(axes, same, shapes, lambda r: "x".join(map(str, r["shape"])), lambda r: r["seconds"])
    axes.set(title=f"Selecting in one matrix ({_short(first)}, {records[0]['dtype']})", ylabel="seconds", yscale="log")


def _off(axes: Any, records: list[Record]) -> None:
    last = records[-1]["shape"]
    same = [r for r in records if r["overlap"] is not None and r["method"] != "baseline"]
    if len({r["matrix"] for r in same}) < len({(r["matrix"], *r["shape"]) for r in same}):
        same = [r for r in same if r["shape"] == last]
    names = list(dict.fromkeys(r["matrix"] for r in same))
    _bars(axes, same, names, lambda r: r["matrix"], lambda r: max(1 - r["overlap"], _LEAST))
    axes.axhline(0.005, color="black", linewidth=0.8, linestyle="--")
    axes.set(title="Share off the exact selection (dashed: budget)", yscale="log", ylim=(_LEAST / 2, 1))
    axes.set_xticks(range(len(names)), [_short(name) for name in names], rotation=30 if len(names) > 4 else 0)


def _bars(axes: Any, records: list[Record], groups: list[str], group_of: Any, value_of: Any) -> None:
    methods = [name for name in _COLOURS if any(r["method"] == name for r in records)]
    width = 0.8 / max(1, len(methods))
    for number, method in enumerate(methods):
        chosen = [r for r in records if r["method"] == method]
        places = [groups.index(group_of(r)) + (number - (len(methods) - 1) / 2) * width for r in chosen]
        axes.bar(places, [value_of(r) for r in chosen], width, label=method, color=_COLOURS[method])
    axes.set_xticks(range(len(groups)), groups)
    axes.spines[["top", "right"]].set_visible(False)


def _short(name: str) -> str:
    return ".".join(name.removesuffix(".weight").split(".")[-3:])
