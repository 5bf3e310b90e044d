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
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lift_ds import watch
from lift_ds.attachment import Attachment
from lift_ds.config import LiftConfig
from lift_ds.layers import PrincipalLayer, logical_shape
from lift_ds.logs import get_logger
from lift_ds.selection import carry_over, deal_out, principal_indices, selection_cost
from lift_ds.store import PrincipalStore, Selection

logger = get_logger()

#: Key in every parameter group that counts the applied steps: part of each optimizer checkpoint, whatever wraps it.
APPLIED_STEPS = "lift_steps"


def select(name: str, weight: Tensor, config: LiftConfig) -> Tensor:
    """Select the principal indices of one managed weight.

    Args:
        name: dotted name of the layer, for the message of an error.
        weight: [m, n], whole.
        config: budget, rank and solver.

    Returns:
        int32 [k], ascending.

    Raises:
        ValueError: when the weight has NaN or infinite entries, naming it.
    """
    k = config.entries(*weight.shape)
    try:
        return principal_indices(weight, k=k, lra_rank=config.lra_rank, solver=config.solver).int()
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
        reports: what the refreshes of this process did, oldest first.
    """

    def __init__(self, attachment: Attachment, store: PrincipalStore, optimizer: Any) -> None:
        self.attachment = attachment
        self.store = store
        self._optimizer = optimizer
        self.reports: list[RefreshReport] = []
        self._jobs = self._deal_out()
        owner_of = {job: rank for rank, jobs in enumerate(self._jobs) for job in jobs}
        self._owners = [owner_of[job] for job in range(len(attachment.layers))]
        attachment.driver = self

    def owned_by(self, rank: int) -> list[str]:
        """Return the names of the layers that a rank selects in, longest job first."""
        names = list(self.attachment.layers)
        return [names[job] for job in self._jobs[rank]] if rank < len(self._jobs) else []

    def _deal_out(self) -> list[list[int]]:
        """For each rank the numbers of the layers it selects in, longest first."""
        config = self.attachment.config
        shapes = [logical_shape(layer.weight) for layer in self.attachment.layers.values()]
        costs = [selection_cost(rows, columns, config.lra_rank, config.solver) for rows, columns in shapes]
        return deal_out(costs, self.store.ranks)

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
        for (name, layer), owner in zip(self.attachment.layers.items(), self._owners, strict=True):
            selection = self.store.hand_out(layer, owner, selections.pop(name, None))
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
        layers = list(self.attachment.layers.items())
        selections: dict[str, Selection] = {}
        failure = ""
        for round_ in itertools.zip_longest(*self._jobs):
            mine: tuple[str, Tensor] | None = None
            for owner, job in enumerate(round_):
                if job is not None:
                    name, layer = layers[job]
                    weight = self.store.collect(layer, owner)
                    if weight is not None and owner == self.store.rank:
                        mine = name, weight
            if mine is not None and not failure:
                try:
                    selections[mine[0]] = self._select_one(*mine)
                except ValueError as error:  # the other ranks are to stop too, not to wait
                    failure = str(error)
        return selections, self.store.agree(failure, time.perf_counter() - start)

    def _select_one(self, name: str, weight: Tensor) -> Selection:
        with watch.during(f"selecting in {name}"):
            index = select(name, weight, self.attachment.config)
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
