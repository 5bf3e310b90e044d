"""The figures of a refresh in what a Trainer logs: on the terminal, in its history, for TensorBoard and W&B."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback

from lift_ds.refresh import RefreshReport


def figures(report: RefreshReport) -> dict[str, float]:
    """Return what is logged of a refresh.

    `lift_estimate` is the share of the selection that may differ from the exact one, by the solver's own estimate.
    """
    return {
        "lift_churn": report.churn,
        "lift_entries": report.entries,
        "lift_estimate": report.estimate,
        "lift_refresh_seconds": report.seconds,
    }


class FiguresInLogs:
    """Adds figures to what a Trainer logs next, before anything reports it.

    A callback cannot do so by itself: a Trainer does not tell its callbacks who it is, and those that report to
    TensorBoard or W&B come before the user's own. So `Trainer.log` is replaced while there is something to train.

    Args:
        callback: by which the Trainer is known.
    """

    def __init__(self, callback: TrainerCallback) -> None:
        self._callback = callback
        self._figures: dict[str, float] = {}

    def hold(self) -> None:
        """From now on what is added goes into the Trainer's logs."""
        _active.append(self)
        Trainer.log = _log_with_figures

    def add(self, figures: dict[str, float]) -> None:
        """Have figures logged with the next loss."""
        self._figures |= figures

    def release(self) -> None:
        """Leave the logs to the Trainer again."""
        _active[:] = [other for other in _active if other is not self]
        if not _active:
            Trainer.log = _plain_log

    def taken_for(self, trainer: Trainer) -> dict[str, float]:
        """Return what is to be logged by a Trainer, once."""
        if not any(callback is self._callback for callback in trainer.callback_handler.callbacks):
            return {}
        taken, self._figures = self._figures, {}
        return taken


_plain_log = Trainer.log
_active: list[FiguresInLogs] = []


def _log_with_figures(trainer: Trainer, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
    if "loss" in logs:
        for active in _active:
            logs = {**logs, **active.taken_for(trainer)}
    _plain_log(trainer, logs, *args, **kwargs)
