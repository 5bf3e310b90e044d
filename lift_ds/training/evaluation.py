"""The held-out rows that the trainer evaluates before its first step and after its last."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from lift_ds.training.data import choose
from lift_ds.training.demo import run as demo


@dataclass(frozen=True)
class Evaluation:
    """Rows to evaluate, and how to speak of them."""

    rows: Dataset | dict[str, Dataset]  # one set, or several by name
    metrics: dict[str, str]  # name of the metric -> row of the final table
    choice: str = ""  # how these rows were chosen; empty where they are all that there are

    def announcement(self, used: int) -> str:
        """Return what to say when the rows are about to be evaluated for the first time.

        Args:
            used: how many of them are evaluated, after those that are too long have been left out.

        Returns:
            A line.
        """
        return f"evaluating {used:,} held-out rows before the first step" + (f"; {self.choice}" if self.choice else "")


def of_held_out(held_out: Dataset, most: int, seed: int) -> Evaluation:
    """Evaluate held-out rows, and of too many a part.

    Args:
        held_out: the rows.
        most: how many of them at most; 0 for all.
        seed: picks the rows; the same seed picks the same rows on every rank.

    Returns:
        What to evaluate.
    """
    metrics = {"eval_loss": "held-out rows"}
    if most == 0 or len(held_out) <= most:
        return Evaluation(held_out, metrics)
    choice = f"{most:,} of {len(held_out):,} were picked by --seed {seed} (--eval_max_rows {most}; 0 for all)"
    return Evaluation(choose(held_out, most, seed), metrics, choice)


def of_demo(base: Path) -> Evaluation:
    """Evaluate all of what shows what the generated run has learned and kept.

    Args:
        base: folder of the base model.

    Returns:
        What to evaluate.
    """
    names = {demo.NEW: "word problems (new task)", demo.OLD: "stories (what it knew)"}
    return Evaluation(demo.held_out(base), {f"eval_{key}_loss": name for key, name in names.items()})
