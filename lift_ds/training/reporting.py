"""What a run prints: its speed while it trains, and its held-out losses at the end."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import transformers
from transformers import TrainerCallback

from lift_ds.runtime.logs import is_main_rank


class SpeedCallback(TrainerCallback):
    """Adds `tokens_per_second` to the training logs: over all ranks, since the last log, evaluation left out.

    The Trainer's own figure averages from the start and counts the time of evaluations.
    """

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self._step_began: float | None = None

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        # From the end of the last step, if nothing came between: waiting for data is part of training.
        if self._step_began is None:
            self._step_began = time.monotonic()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.monotonic()
        if self._step_began is not None:
            self._seconds += now - self._step_began
        self._step_began = now

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        self._step_began = None

    on_save = on_evaluate

    def on_log(self, *_: Any, logs: dict[str, Any] | None = None, **__: Any) -> None:
        if logs is None or "loss" not in logs or "num_tokens" not in logs:
            return
        if self._seconds > 0:
            logs["tokens_per_second"] = round((logs["num_tokens"] - self._tokens) / self._seconds)
        self._tokens, self._seconds = logs["num_tokens"], 0.0


def first_losses(log_history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the first held-out losses of a run, also one that was resumed, by metric name.

    Args:
        log_history: as the Trainer's state keeps it.

    Returns:
        Metric name (`eval_loss`, `eval_<name>_loss`) -> loss.
    """
    found: dict[str, float] = {}
    for entry in log_history:
        for key, value in entry.items():
            if key.startswith("eval_") and key.endswith("loss"):
                found.setdefault(key, float(value))
    return found


def loss_table(before: Mapping[str, float], after: Mapping[str, float], names: Mapping[str, str]) -> str:
    """Lay out held-out losses before and after training.

    Args:
        before: metric name -> loss.
        after: metric name -> loss.
        names: metric name -> what to call it, in the order of the rows.

    Returns:
        A table of one line a metric; metrics that were not measured on both sides are left out.
    """
    rows = [("held-out loss", "before", "after", "change")]
    for metric, name in names.items():
        if metric in before and metric in after:
            was, now = before[metric], after[metric]
            rows.append((name, f"{was:.4f}", f"{now:.4f}", f"{(now - was) / was:+.1%}"))
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{name:<{width}}  {was:>8}  {now:>8}  {change:>8}" for name, was, now, change in rows)


def speak_on_one_rank() -> None:
    """Keep what is the same on every rank to rank 0: warnings, progress bars, the libraries' logs."""
    transformers.logging.set_verbosity_warning()
    if is_main_rank():
        return
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
