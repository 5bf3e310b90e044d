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
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from tqdm import tqdm

from lift_ds.model.attachment import Attachment
from lift_ds.model.layers import PrincipalLayer
from lift_ds.model.targets import kinds_of
from lift_ds.refresh.carry import carry_over
from lift_ds.refresh.report import RefreshReport
from lift_ds.refresh.schedule import Jobs, RefreshPlan, plan_refresh
from lift_ds.refresh.store import NewIndex, PrincipalStore
from lift_ds.runtime import watchdog
from lift_ds.runtime.logs import get_logger, is_main_rank
from lift_ds.selection import MatrixSize, Selected
from lift_ds.selection.select import select_in

logger = get_logger()

#: Key in every parameter group that counts the applied steps: part of each optimizer checkpoint, whatever wraps it.
APPLIED_STEPS = "lift_steps"

#: A refresh that takes longer than this shows its progress.
_PROGRESS_AFTER_SECONDS = 10.0


class _Work(NamedTuple):
    """What one rank did in a refresh: see `RefreshReport`."""

    seconds: float
    fell_back: float
    estimate: float


class Driver:
    """Runs after every applied optimizer step: write-back, count, refresh when due.

    Args:
        attachment: the managed layers.
        store: where their state lives.
        optimizer: the innermost torch optimizer; its parameter groups carry the count of applied steps.

    Attributes:
        plan: who selects in which matrix, and when.
        reports: what the refreshes of this process did, or the parts of them, oldest first.
        refreshes: the same for whole refreshes, when their last part is made.
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
        self._unfinished: list[RefreshReport] = []  # parts of the refresh that is under way
        self._untrained = [*attachment.layers]  # as far as has been looked
        self._looks = 0

    def _plan(self) -> RefreshPlan:
        layers = self.attachment.layers
        weights = [layer.weight for layer in layers.values()]
        itemsize = max(weight.element_size() for weight in weights)
        return plan_refresh(
            {name: MatrixSize.of(layer.shape(), itemsize) for name, layer in layers.items()},
            self.attachment.config,
            self.store.ranks,
            collected=self.store.sharded,
            device_type=weights[0].device.type,
        )

    @property
    def applied_steps(self) -> int:
        """Optimizer steps applied since training began, over restarts."""
        return self._optimizer.param_groups[0].get(APPLIED_STEPS, 0)

    def step_applied(self) -> None:
        """Take note of one applied optimizer step.

        Afterwards W holds the trained values on every rank, and the selection is that of the schedule.
        """
        self.attachment.confirm_gradients()
        steps = self.applied_steps + 1
        due = self.plan.due(steps)
        names = set(itertools.chain.from_iterable(due or ()))
        self.store.write_back([layer for name, layer in self.attachment.layers.items() if name not in names])
        for group in self._optimizer.param_groups:
            group[APPLIED_STEPS] = steps
        if due is not None:
            with watchdog.during(f"refresh at step {steps}"):
                self._require_equal(names, write_first=True)
                self._refresh(steps, due)
        self.store.release()
        if self._looks == 0 or (self._looks == 1 and due is not None and self.plan.completes(steps)):
            self._tell_untrained(steps)

    def _tell_untrained(self, step: int) -> None:
        """Name the matrices that no gradient has reached: after the first step, and where it lasts after a refresh."""
        if not self._untrained:
            return
        layers = {name: self.attachment.layers[name] for name in self._untrained}
        reached = self.store.on_any_rank([layer in self.attachment.ever_reached for layer in layers.values()])
        self._untrained = [name for name, found in zip(layers, reached, strict=True) if not found]
        self._looks += 1
        if self._untrained:
            logger.warning(
                "after step %d no gradient has reached %d of %d managed matrices, which are not trained: %s. The model "
                "reads these weights without calling their layers, or they take no part in the loss; exclude_modules "
                "leaves them out",
                step, len(self._untrained), len(self.attachment.layers), ", ".join(kinds_of(self._untrained)),
            )  # fmt: skip

    def check_state(self) -> None:
        """Check that optimizer and weights agree, as after loading a checkpoint; all ranks call.

        Raises:
            RuntimeError: as `_require_equal`; nothing was changed.
        """
        self._require_equal(set(self.attachment.layers), write_first=False)
        self.store.release()

    def _require_equal(self, names: Collection[str], *, write_first: bool) -> None:
        """Check that the weights at the principal entries are the master values, rounded to the weights' dtype.

        What the optimizer's state is read from is DeepSpeed's business, and it may be another one's.

        Args:
            names: of the matrices to look at.
            write_first: write them back before, in the same pass.

        Raises:
            RuntimeError: on every rank, when they differ in a matrix, or a part of its state is missing; names it.
        """
        layers = {name: layer for name, layer in self.attachment.layers.items() if name in names}
        counts = self.store.compare(list(layers.values()), write_first=write_first).tolist()
        wrong = []
        for (name, layer), (differing, found) in zip(layers.items(), counts, strict=True):
            if found != layer.entries():
                wrong.append(f"{name} (the state has {found:,} of its {layer.entries():,} entries)")
            elif differing:
                wrong.append(f"{name} (at {differing:,} of {found:,} entries)")
        if wrong:
            raise RuntimeError(
                f"the optimizer's master values are not the trained weights in {len(wrong)} of {len(layers)} matrices, "
                f"the first of them {wrong[0]}. Nothing was selected and nothing saved. Either another program has "
                "changed weights or state, or an option of DeepSpeed keeps the state in a way that LIFT does not know: "
                "leave that option out and continue from the last checkpoint"
            )

    def step_skipped(self) -> None:
        """Take note of a step that was not applied (overflow): nothing moves, nothing is counted."""
        self.store.release()

    def _refresh(self, step: int, jobs: Jobs) -> None:
        start = time.perf_counter()
        owners = {name: rank for rank, names in enumerate(jobs) for name in names}
        selections, work = self._select(jobs)
        layers = {name: layer for name, layer in self.attachment.layers.items() if name in owners}
        replaced = 0
        for name, layer in layers.items():
            selection = self.store.hand_out(layer, owners[name], selections.pop(name, None))
            replaced += self._carry(layer, selection)
        self._report(
            RefreshReport(
                step,
                len(layers),
                sum(layer.entries() for layer in layers.values()),
                replaced,
                time.perf_counter() - start,
                tuple(one.seconds for one in work),
                int(sum(one.fell_back for one in work)),
                max(one.estimate for one in work),
            )
        )

    def _report(self, report: RefreshReport) -> None:
        self.reports.append(report)
        self._unfinished.append(report)
        if self.plan.completes(report.step):
            whole = RefreshReport.of(self._unfinished)
            logger.info("%s", whole)
            self.refreshes.append(whole)
            self._unfinished = []

    def _select(self, jobs: Jobs) -> tuple[dict[str, NewIndex], list[_Work]]:
        """Select in the matrices this rank owns; return the selections by name, and the work of each rank."""
        start = time.perf_counter()
        selections: dict[str, NewIndex] = {}
        failure, fell_back, estimate = "", 0, 0.0
        with _progress(sum(map(len, jobs))) as progress:
            for round_ in itertools.zip_longest(*jobs):
                mine = self._collect(round_)
                if mine is not None and not failure:
                    try:
                        selections[mine[0]], found = self._select_one(*mine)
                        fell_back, estimate = fell_back + found.fell_back, max(estimate, found.estimate)
                    except ValueError as error:  # the other ranks are to stop too, not to wait
                        failure = str(error)
                del mine  # before the next weight comes
                progress.update(sum(name is not None for name in round_))
        work = _Work(time.perf_counter() - start, fell_back, estimate)
        return selections, [_Work(*numbers) for numbers in self.store.agree(failure, work)]

    def _collect(self, round_: Sequence[str | None]) -> tuple[str, Tensor] | None:
        """Let each owner of a round have its weight; return this rank's, with its name."""
        mine: tuple[str, Tensor] | None = None
        for owner, name in enumerate(round_):
            if name is not None:
                weight = self.store.collect(self.attachment.layers[name], owner)
                if weight is not None and owner == self.store.rank:
                    mine = name, weight
        return mine

    def _select_one(self, name: str, weight: Tensor) -> tuple[NewIndex, Selected]:
        """Select in one matrix; return what to hand out, and how it was found."""
        subspaces = self.attachment.subspaces
        with watchdog.during(f"selecting in {name}"):
            found = select_in(name, weight, self.plan.settings[name], subspaces.get(name))
        if found.subspace is not None:
            subspaces[name] = found.subspace
        return self.store.choose(self.attachment.layers[name], weight, found.index.int()), found

    def _carry(self, layer: PrincipalLayer, selection: NewIndex) -> int:
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
