"""A plan as a picture: what each method and stage holds, and takes at its peak, beside the memory there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lift_ds.planner.formulas import GRADIENTS, INDEX, MASTER, MOMENTS, OTHER, TRAINED, UNMANAGED, WEIGHTS
from lift_ds.planner.plan import Plan

#: From the bottom up.
_PARTS = {
    "weights": (WEIGHTS, UNMANAGED),
    "θ or adapters": (TRAINED,),
    "index": (INDEX,),
    "master and moments": (MASTER, MOMENTS),
    "buckets": (OTHER,),
}
_REST = "activations, gradients, workspace at the peak"


def draw(plan: Plan, path: Path) -> None:
    """Draw a bar for each row of a plan.

    Args:
        plan: what was found.
        path: the picture's; its ending says which kind.

    Raises:
        ValueError: without matplotlib, or when the file cannot be written.
    """
    try:
        from matplotlib import pyplot
    except ImportError as missing:
        raise ValueError(f"--plot needs matplotlib ({missing}): pip install 'lift_ds[benchmarks]'") from None
    pyplot.switch_backend("agg")
    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    _bars(plan, axes)
    limit = plan.cluster.hardware.usable_bytes / 1e9
    axes.axhline(limit, color="black", linestyle="--", linewidth=1)
    axes.text(len(plan.rows) - 0.5, limit, f"{limit:g} GB to plan with", ha="right", va="bottom")
    axes.set_ylim(0, 1.8 * limit)
    axes.set_ylabel("GB on one GPU")
    axes.set_title(f"{plan.facts.name} on {plan.cluster.nodes} x {plan.cluster.gpus_per_node} GPUs")
    axes.legend(fontsize=8, loc="upper right")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"--plot {path}: cannot be written: {error}") from error
    finally:
        pyplot.close(figure)


def _bars(plan: Plan, axes: Any) -> None:
    places = range(len(plan.rows))
    bottom = [0.0] * len(plan.rows)
    parts = {
        label: [sum(row.persistent[name] for name in names) for row in plan.rows] for label, names in _PARTS.items()
    }
    parts[_REST] = [
        row.peak - sum(size for name, size in row.persistent.items() if name != GRADIENTS) for row in plan.rows
    ]
    for label, sizes in parts.items():
        heights = [size / 1e9 for size in sizes]
        axes.bar(places, heights, bottom=bottom, label=label, width=0.7)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    names = [f"{row.choice.method}\nZeRO-{row.choice.stage}{' +host' * row.choice.offload}" for row in plan.rows]
    axes.set_xticks(places, names, fontsize=8)
