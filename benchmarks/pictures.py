"""The pictures of README and docs, drawn into docs/pictures/; the same inputs give the same files.

    python -m benchmarks.pictures

idea.svg      a small matrix, its low-rank approximation and what is selected in it
memory.svg    bytes counted in real runs (results/footprint.json), and what `lift-ds plan` says of larger models
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from lift_ds import cli

RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).parents[1] / "docs" / "pictures"

#: Method -> what it is called, and its colour.
METHODS = {"full": ("full fine-tuning", "#7f7f7f"), "lora": ("LoRA", "#ff7f0e"), "lift": ("LIFT", "#1f77b4")}

#: What a rank holds -> the categories of footprint.json that belong to it, from the bottom of a bar up.
HELD = {
    "weights": ("weights", "unmanaged"),
    "trained values and index": ("trained apart", "index"),
    "gradients": ("gradients", "other"),
    "master values and moments": ("master", "moments"),
}
HELD_COLOURS = ("#c7c7c7", "#1f77b4", "#ffbb78", "#d62728")

PLANNED = ("7B", "13B", "32B", "70B")

#: Keeps the files the same from run to run.
STYLE: Any = {"svg.hashsalt": "lift_ds", "font.size": 10}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=PICTURES, help="the folder")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Draw all pictures."""
    folder = parse_arguments(arguments).output
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name, draw in {"idea": idea, "memory": memory}.items():
            draw().savefig(folder / f"{name}.svg", metadata={"Date": None}, facecolor="white")


def idea() -> Figure:
    """Draw one matrix on its way from its weights to its principal values, and back."""
    weight, approximation, chosen = small_matrix()
    figure = Figure(figsize=(11, 3.6))
    left, width = (0.02, 0.265, 0.51, 0.80), 0.175
    panels = [figure.add_axes((x, 0.24, width, 0.5)) for x in left]
    panels[0].imshow(weight, cmap="RdBu", vmin=-3, vmax=3)
    panels[1].imshow(approximation, cmap="RdBu", vmin=-2, vmax=2)
    panels[2].imshow(np.where(chosen, approximation, np.nan), cmap="RdBu", vmin=-2, vmax=2)
    panels[3].imshow(weight[chosen][None], cmap="RdBu", vmin=-3, vmax=3, aspect="auto")
    panels[3].set_position((left[3], 0.43, width, 0.12))
    titles = (
        "W, frozen",
        "its rank-r approximation",
        "I: where the largest 5% are",
        "θ: the values there, trained",
    )
    for axes, title in zip(panels, titles, strict=True):
        axes.set(xticks=[], yticks=[])
        axes.set_title(title, fontsize=11)
    panels[3].set_xlabel("an ordinary parameter:\nZeRO shards it with its gradient\nand the states of Adam", fontsize=9)
    for x in (0.198, 0.443, 0.688):
        _arrow(figure, (x, 0.49), (x + 0.064, 0.49), "arc3")
    figure.text(0.23, 0.53, "SVD", ha="center", fontsize=9)
    figure.text(0.475, 0.53, "top k", ha="center", fontsize=9)
    figure.text(0.743, 0.53, "W.flat[I]", ha="center", fontsize=9)
    _arrow(figure, (0.89, 0.84), (0.11, 0.84), "arc3,rad=0.06")
    figure.text(0.5, 0.93, "after every step: W.flat[I] = θ", ha="center", fontsize=10)
    _arrow(figure, (0.11, 0.2), (0.597, 0.2), "arc3,rad=0.1")
    figure.text(0.35, 0.03, "every refresh_interval steps: select again from the trained W", ha="center", fontsize=10)
    return figure


def _arrow(figure: Figure, start: tuple[float, float], end: tuple[float, float], bend: str) -> None:
    style: Any = {"arrowstyle": "-|>", "connectionstyle": bend, "mutation_scale": 14, "color": "#444444"}
    figure.add_artist(matplotlib.patches.FancyArrowPatch(start, end, transform=figure.transFigure, **style))


def small_matrix() -> tuple[Any, Any, Any]:
    """Return W [24, 32], its approximation of rank 3, and where the 5% of that are which are largest in magnitude."""
    random = np.random.default_rng(0)
    weight = random.normal(size=(24, 3)) @ random.normal(size=(3, 32)) / 2 + random.normal(size=(24, 32))
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    approximation = u[:, :3] * s[:3] @ vt[:3]
    k = round(0.05 * weight.size)
    least = np.sort(np.abs(approximation), axis=None)[-k]
    # Rounded, so that no machine's last digit shows in the file.
    return weight.round(2), approximation.round(2), np.abs(approximation) >= least


def memory() -> Figure:
    """Draw what was counted on small models beside what is planned for large ones."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
    _counted(left)
    _planned(right)
    return figure


def _counted(axes: Any) -> None:
    records = json.loads((RESULTS / "footprint.json").read_text())["records"]
    bars = [(method, stage) for stage in (2, 3) for method in METHODS]
    found = {(r["method"], r["stage"]): r["persistent"] for r in records if r["ranks"] == 4}
    bottom = [0.0] * len(bars)
    for (label, names), colour in zip(HELD.items(), HELD_COLOURS, strict=True):
        heights = [sum(found[bar][name]["counted"] for name in names) for bar in bars]
        axes.bar(range(len(bars)), heights, bottom=bottom, label=label, color=colour, width=0.7)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    for place, total in enumerate(bottom):
        axes.text(place, total + 0.08, f"{total:.2f}", ha="center")
    short = {"full": "full", "lora": "LoRA", "lift": "LIFT"}
    axes.set_xticks(range(len(bars)), [f"{short[method]}\nZeRO-{stage}" for method, stage in bars], fontsize=9)
    axes.set(title="Held by a rank of four: counted", ylabel="bytes per managed parameter", ylim=(0, 6.5))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)


def _planned(axes: Any) -> None:
    width = 0.26
    for place, model in enumerate(PLANNED):
        plan = planned(model)
        for number, (method, (label, colour)) in enumerate(METHODS.items()):
            row = next(choice for choice in plan["choices"] if choice["method"] == method)
            held = sum(size for name, size in row["persistent_bytes"].items() if name != "gradients") / 1e9
            x = place + (number - 1) * width
            axes.bar(x, row["peak_bytes"] / 1e9, width * 0.9, color=colour, alpha=0.4)
            axes.bar(x, held, width * 0.9, color=colour, label=label if place == 0 else None)
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
            axes.text(
                x, row["peak_bytes"] / 1e9 + 2, f"{row['peak_bytes'] / 1e9:.0f}", ha="center", fontsize=9, bbox=box
            )
    axes.axhline(76, color="black", linestyle="--", linewidth=1)
    axes.text(-0.45, 78, "76 of 80 GB", fontsize=9)
    axes.set_xticks(range(len(PLANNED)), PLANNED)
    axes.set(title="One of 8 GPUs, ZeRO-3, one sequence of 2048 tokens: planned", ylabel="GB")
    axes.text(-0.45, 95, "dark: held between steps\npale: peak of a step", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 0.98))


def planned(model: str) -> Any:
    """Return what `lift-ds plan` writes of a model on a node of 8 x 80 GB, in ZeRO-3, a sequence at a time."""
    command = ["plan", "--model", model, "--gpu-memory", "80", "--stages", "3", "--no-offload"]
    command += ["--micro-batch", "1", "--checkpointing", "on"]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = Path(folder) / "plan.json"
        assert cli.main([*command, "--json", str(path)]) == 0
        return json.loads(path.read_text())


if __name__ == "__main__":
    main()
