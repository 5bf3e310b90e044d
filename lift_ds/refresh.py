"""The refresh: select again from the current weights, carry the state over; and the clock that says when.

`Driver` is what runs after every applied optimizer step. Where weights, indices and states live is the business of a
`PrincipalStore`.

A refresh in three phases, for N ranks:

    select     every matrix has an owner; in each round an owner receives one whole weight, factors it and selects
    agree      all ranks learn whether a selection failed anywhere, and how long each took
    carry      one matrix after the other: the owner hands out the new index, master and moments are carried over
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from tqdm import tqdm

from lift_ds import watch
from lift_ds.attachment import Attachment
from lift_ds.config import LiftConfig
from lift_ds.layers import PrincipalLayer
from lift_ds.logs import get_logger, is_main_rank
from lift_ds.refresh_plan import RefreshPlan, plan_refresh
from lift_ds.selection import carry_over, principal_indices
from lift_ds.store import PrincipalStore, Selection

logger = get_logger()

#: Key in every parameter group that counts the applied steps: part of each optimizer checkpoint, whatever wraps it.
APPLIED_STEPS = "lift_steps"

#: A refresh that takes longer than this shows its progress.
_PROGRESS_AFTER_SECONDS = 10.0


def select(name: str, weight: Tensor, config: LiftConfig, tile_entries: int) -> Tensor:
    """Select the principal indices of one managed weight.

    Args:
        name: dotted name of the layer, for the message of an error.
        weight: [m, n], whole.
        config: budget, rank and solver.
        tile_entries: entries of W' that are formed at a time.

    Returns:
        int32 [k], ascending.

    Raises:
        ValueError: when the weight has NaN or infinite entries, naming it.
    """
    k = config.entries(*weight.shape)
    try:
        return principal_indices(
            weight, k=k, lra_rank=config.lra_rank, solver=config.solver, tile_entries=tile_entries
        ).int()
    except ValueError as error:
        raise ValueError(f"{name}.weight: {error}") from error


@dataclass(frozen=True)
class RefreshReport:
    """What one refresh did: at which applied step, matrices, entries in all, share replaced, seconds."""

    step: int
    matrices: int
    entries: int
    churn: float
    seconds: float
    #: Seconds each rank spent on receiving, factoring and selecting.
    selection_seconds: tuple[float, ...]

    def __str__(self) -> str:
        text = (
            f"LIFT refresh at step {self.step}: {self.matrices} matrices, {self.entries:,} entries, "
            f"churn {self.churn:.1%}, {self.seconds:.2f} s"
        )
        if len(self.selection_seconds) == 1:
            return text
        slowest = max(range(len(self.selection_seconds)), key=self.selection_seconds.__getitem__)
        return f"{text} (selection on the slowest rank, {slowest}: {self.selection_seconds[slowest]:.2f} s)"


class Driver:
    """Runs after every applied optimizer step: write-back, count, refresh when due.

    Args:
        attachment: the managed layers.
        store: where their state lives.
        optimizer: the innermost torch optimizer; its parameter groups carry the count of applied steps.

    Attributes:
        plan: who selects in which matrix.
        reports: what the refreshes of this process did, oldest first.
    """

    def __init__(self, attachment: Attachment, store: PrincipalStore, optimizer: Any) -> None:
        self.attachment = attachment
        self.store = store
        self._optimizer = optimizer
        self.reports: list[RefreshReport] = []
        self.plan = self._plan()
        attachment.driver = self

    def _plan(self) -> RefreshPlan:
        layers = self.attachment.layers
        shapes = {name: (rows, columns) for name, layer in layers.items() for rows, columns in [layer.shape()]}
        itemsize = max(layer.weight.element_size() for layer in layers.values())
        return plan_refresh(shapes, itemsize, self.attachment.config, self.store.ranks, collected=self.store.sharded)

    @property
    def applied_steps(self) -> int:
        """Optimizer steps applied since training began, over restarts."""
        return self._optimizer.param_groups[0].get(APPLIED_STEPS, 0)

    def step_applied(self) -> None:
        """Take note of one applied optimizer step.

        Afterwards W holds the trained values on every rank, and the selection is that of the schedule.
        """
        self.attachment.confirm_gradients()
        self.store.write_back(list(self.attachment.layers.values()))
        steps = self.applied_steps + 1
        for group in self._optimizer.param_groups:
            group[APPLIED_STEPS] = steps
        if steps % self.attachment.config.refresh_interval == 0:
            with watch.during(f"refresh at step {steps}"):
                self._refresh(steps)

    def step_skipped(self) -> None:
        """Take note of a step that was not applied (overflow): nothing moves, nothing is counted."""
        self.store.release()

    def _refresh(self, step: int) -> None:
        start = time.perf_counter()
        selections, seconds = self._select()
        replaced = 0
        for name, layer in self.attachment.layers.items():
            selection = self.store.hand_out(layer, self.plan.owner_of(name), selections.pop(name, None))
            replaced += self._carry(layer, selection)
        entries = self.attachment.entries()
        report = RefreshReport(
            step,
            len(self.attachment.layers),
            entries,
            replaced / entries,
            time.perf_counter() - start,
            tuple(seconds),
        )
        self.reports.append(report)
        logger.info("%s", report)

    def _select(self) -> tuple[dict[str, Selection], list[float]]:
        """Select in the matrices this rank owns; return them by name, and the seconds each rank took."""
        start = time.perf_counter()
        selections: dict[str, Selection] = {}
        failure = ""
        with _progress(len(self.attachment.layers)) as progress:
            for round_ in itertools.zip_longest(*self.plan.jobs):
                mine = self._collect(round_)
                if mine is not None and not failure:
                    try:
                        selections[mine[0]] = self._select_one(*mine)
                    except ValueError as error:  # the other ranks are to stop too, not to wait
                        failure = str(error)
                del mine  # before the next weight comes
                progress.update(sum(name is not None for name in round_))
        return selections, self.store.agree(failure, time.perf_counter() - start)

    def _collect(self, round_: Sequence[str | None]) -> tuple[str, Tensor] | None:
        """Let each owner of a round have its weight; return this rank's, with its name."""
        mine: tuple[str, Tensor] | None = None
        for owner, name in enumerate(round_):
            if name is not None:
                weight = self.store.collect(self.attachment.layers[name], owner)
                if weight is not None and owner == self.store.rank:
                    mine = name, weight
        return mine

    def _select_one(self, name: str, weight: Tensor) -> Selection:
        with watch.during(f"selecting in {name}"):
            index = select(name, weight, self.attachment.config, self.plan.tile_entries[name])
        return self.store.choose(self.attachment.layers[name], weight, index)

    def _carry(self, layer: PrincipalLayer, selection: Selection) -> int:
        """Carry the state of one layer over to its new index; return how many entries are new."""
        index = layer.principal.index.decode(selection.words)
        current = self.store.current(layer, selection, index)
        with self.store.whole_index(layer):
            old_index = layer.principal_index
        state, replaced = carry_over(old_index, self.store.read_state(layer), index, current)
        self.store.replace(layer, selection.words, state)
        return replaced


def _progress(matrices: int) -> tqdm:
    return tqdm(
        total=matrices,
        desc="LIFT refresh",
        unit="matrix",
        delay=_PROGRESS_AFTER_SECONDS,
        leave=False,
        disable=not is_main_rank(),
    )
