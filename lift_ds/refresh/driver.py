"""What runs after every applied optimizer step: the write-back, and the refresh when it is due.

A refresh selects again from the current weights and carries the state over. `Driver` does both through a
`PrincipalStore`, which knows where weights, indices and states are.

A refresh in three phases, for N ranks:

    select     every matrix has an owner; in each round an owner receives one whole weight, factors it and selects
    agree      all ranks learn whether a selection failed anywhere, and how long each took
    carry      one weight after the other: the owners hand out its new indices, master and moments are carried over
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from lift_ds.model.attachment import Attachment
from lift_ds.model.weights import PrincipalWeight
from lift_ds.refresh.changes import Changes
from lift_ds.refresh.checks import Untrained, require_equal
from lift_ds.refresh.gradients import gradients_of, in_groups
from lift_ds.refresh.report import RefreshReport
from lift_ds.refresh.schedule import Jobs, RefreshPlan, plan_refresh
from lift_ds.refresh.store import NewIndex, PrincipalStore
from lift_ds.runtime import watchdog
from lift_ds.runtime.logs import get_logger
from lift_ds.runtime.ranks import in_rounds
from lift_ds.selection import MatrixSize, Selected
from lift_ds.selection.select import select_in

logger = get_logger()

#: Key in every parameter group that counts the applied steps: part of each optimizer checkpoint, whatever wraps it.
APPLIED_STEPS = "lift_steps"


class _Work(NamedTuple):
    """What one rank did in a refresh: see `RefreshReport`."""

    seconds: float
    fell_back: float
    estimate: float


class Driver:
    """Runs after every applied optimizer step: write-back, count, refresh when due.

    Args:
        attachment: the managed weights.
        store: where their state lives.
        optimizer: the innermost torch optimizer; its parameter groups carry the count of applied steps.

    Attributes:
        plan: who selects in which matrix, and when.
        reports: what the refreshes of this process did, or the parts of them, oldest first.
        refreshes: the same for whole refreshes, when their last part is made.
        changes: what training has changed, where a setting asks for it.
    """

    def __init__(self, attachment: Attachment, store: PrincipalStore, optimizer: Any) -> None:
        self.attachment = attachment
        self.store = store
        self._optimizer = optimizer
        self.reports: list[RefreshReport] = []
        self.refreshes: list[RefreshReport] = []
        self.plan = self._plan()
        attachment.driver, attachment.partitioned = self, store.sharded
        own = self.plan.jobs_of(store.rank)
        attachment.subspaces = {name: start for name, start in attachment.subspaces.items() if name in own}
        self.changes = Changes(attachment, store)
        self._unfinished: list[RefreshReport] = []  # parts of the refresh that is under way
        self._untrained = Untrained(attachment, store)

    def _plan(self) -> RefreshPlan:
        weights = [weight.weight for weight in self.attachment.weights.values()]
        itemsize = max(weight.element_size() for weight in weights)
        return plan_refresh(
            {
                name: MatrixSize.of(weight.shape(), itemsize, weight.matrices)
                for name, weight in self.attachment.weights.items()
            },
            self.attachment.config,
            self.store.ranks,
            collected=self.store.sharded,
            device_type=weights[0].device.type,
        )

    @property
    def applied_steps(self) -> int:
        """Optimizer steps applied since training began, over restarts."""
        return self._optimizer.param_groups[0].get(APPLIED_STEPS, 0)

    def step_begins(self) -> None:
        """Take note that the optimizer is about to make a step; all ranks call."""
        self.attachment.require_trained()
        if not self.changes.begun:
            self.changes.begin(self.applied_steps)

    def step_applied(self) -> None:
        """Take note of one applied optimizer step.

        Afterwards W holds the trained values on every rank, and the selection is that of the schedule.
        """
        self.attachment.confirm_gradients()
        steps = self.applied_steps + 1
        due = self.plan.due(steps)
        refreshed = self._weights_of(due or ())
        self.store.write_back([weight for name, weight in self.attachment.weights.items() if name not in refreshed])
        for group in self._optimizer.param_groups:
            group[APPLIED_STEPS] = steps
        if due is not None:
            with watchdog.during(f"refresh at step {steps}"):
                require_equal(self.store, refreshed, write_first=True)
                self._refresh(steps, due)
        self.store.release()
        self._untrained.after_step(steps, refreshed=due is not None and self.plan.completes(steps))

    def check_state(self) -> None:
        """Check that optimizer and weights agree, as after loading a checkpoint; all ranks call.

        Raises:
            RuntimeError: as `require_equal`; nothing was changed.
        """
        require_equal(self.store, self.attachment.weights, write_first=False)
        self.store.release()

    def step_skipped(self) -> None:
        """Take note of a step that was not applied (overflow): nothing moves, nothing is counted."""
        self.store.release()

    def select_now(self) -> None:
        """Select in all matrices before the first step; all ranks call."""
        jobs = [self.plan.jobs_of(rank) for rank in range(self.store.ranks)]
        with watchdog.during("the first selection by gradients"):
            report = self._renew(0, jobs)
        self.store.release()
        logger.info(
            "LIFT selected by gradients in %d matrices: %.1f%% of the %s entries are not those of the largest weights; "
            "%.2f s",
            report.matrices, 100 * report.churn, f"{report.entries:,}", report.seconds,
        )  # fmt: skip

    def _refresh(self, step: int, jobs: Jobs) -> None:
        report = self._renew(step, jobs)
        self.reports.append(report)
        self._unfinished.append(report)
        if self.plan.completes(step):
            whole = RefreshReport.of(self._unfinished)
            logger.info("%s", whole)
            self.refreshes.append(whole)
            self._unfinished = []

    def _renew(self, step: int, jobs: Jobs) -> RefreshReport:
        """Select in some matrices, and carry the states over to the new selections."""
        start = time.perf_counter()
        owners = {name: rank for rank, names in enumerate(jobs) for name in names}
        selections, work = self._select(jobs)
        weights = list(self._weights_of(jobs).values())
        replaced = 0
        for turn in self.store.turns(weights):
            new = []
            for weight in turn:
                handed = [
                    self.store.hand_out(weight, owners[name], selections.pop(name, None))
                    for name in weight.matrix_names()
                ]
                new.append((weight, handed))
                self.changes.renew(weight, [one.words for one in handed], step)
            replaced += self.store.carry(new)
        return RefreshReport(
            step,
            len(owners),
            sum(weight.entries() for weight in weights),
            self.store.total(replaced),
            time.perf_counter() - start,
            tuple(one.seconds for one in work),
            int(sum(one.fell_back for one in work)),
            max(one.estimate for one in work),
        )

    def _weights_of(self, jobs: Iterable[Sequence[str]]) -> dict[str, PrincipalWeight]:
        """Return the weights of the matrices in some jobs, by name, in the order of the model."""
        names = set(itertools.chain.from_iterable(jobs))
        return {
            name: weight for name, weight in self.attachment.weights.items() if names.issuperset(weight.matrix_names())
        }

    def _select(self, jobs: Jobs) -> tuple[dict[str, NewIndex], list[_Work]]:
        """Select in the matrices this rank owns; return the selections by name, and the work of each rank."""
        start = time.perf_counter()
        matrices, failure = self.attachment.matrices, ""
        selections: dict[str, NewIndex] = {}
        ways: list[tuple[bool, float]] = []

        def select(name: str, weight: Tensor) -> None:
            selections[name], found = self._select_one(name, weight, gradients.get(name))
            ways.append((found.fell_back, found.estimate))

        for group in in_groups(jobs, self.attachment) if self.attachment.needs_gradients else [jobs]:
            gradients = gradients_of(group[self.store.rank], self.attachment, self.store)
            failed = in_rounds(
                group, lambda name, owner: self.store.collect(*matrices[name], owner), select, about="LIFT refresh"
            )
            failure = failure or failed
            gradients.clear()  # before the next are measured
        fell_back, estimate = sum(fell_back for fell_back, _ in ways), max((share for _, share in ways), default=0.0)
        work = _Work(time.perf_counter() - start, fell_back, estimate)
        return selections, [_Work(*numbers) for numbers in self.store.agree(failure, work)]

    def _select_one(self, name: str, weight: Tensor, gradient: Tensor | None) -> tuple[NewIndex, Selected]:
        """Select in one matrix; return what to hand out, and how it was found."""
        subspaces = self.attachment.subspaces
        with watchdog.during(f"selecting in {name}"):
            found = select_in(name, weight, self.plan.settings[name], subspaces.get(name), gradient)
        if found.subspace is not None:
            subspaces[name] = found.subspace
        return self.store.choose(self.attachment.matrices[name].weight, weight, found.index.int()), found
