"""The refresh: select again from the current weights, carry the state over; and the clock that says when.

`Driver` is what runs after every applied optimizer step. Where weights, indices and states live is the business of a
`PrincipalStore`: one process keeps them whole (`DenseStore`), DeepSpeed spreads them (`lift_ds.zero`).

A refresh in three phases, for N ranks:

    select     every matrix has an owner; in each round an owner receives one whole weight, factors it and selects
    agree      all ranks learn whether a selection failed anywhere, and how long each took
    carry      one matrix after the other: the owner hands out the new index, master and moments are carried over
"""

from __future__ import annotations

import itertools
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lift_ds import watch
from lift_ds.attachment import Attachment
from lift_ds.config import LiftConfig
from lift_ds.layers import PrincipalLayer, logical_shape
from lift_ds.logs import get_logger
from lift_ds.selection import PrincipalState, carry_over, deal_out, principal_indices, selection_cost

logger = get_logger()

#: Key in every parameter group that counts the applied steps: part of each optimizer checkpoint, whatever wraps it.
APPLIED_STEPS = "lift_steps"


@dataclass(frozen=True)
class Selection:
    """What an owner found in one matrix: the new index int32 [k], ascending, and the current weights there [k]."""

    index: Tensor
    current: Tensor


class PrincipalStore(Protocol):
    """Where the weights, indices, master values and moments of a run live."""

    rank: int
    ranks: int

    def collect(self, layer: PrincipalLayer, owner: int) -> Tensor | None:
        """Return the whole weight [m, n] on the owner, None on the other ranks; all of them call."""

    def hand_out(self, layer: PrincipalLayer, owner: int, selection: Selection | None) -> Selection:
        """Return the owner's selection on every rank; None is given on the others."""

    def agree(self, failure: str, seconds: float) -> list[float]:
        """Return the seconds of all ranks.

        Raises:
            ValueError: on every rank, if any of them gives a failure; with the first one's text.
        """

    def whole_index(self, layer: PrincipalLayer) -> AbstractContextManager[object]:
        """Make `layer.principal_index` whole on every rank within the context."""

    def read_state(self, layer: PrincipalLayer) -> PrincipalState:
        """Return master and moments in the order of the index, whole on every rank."""

    def replace(self, layer: PrincipalLayer, index: Tensor, state: PrincipalState) -> None:
        """Store a new index (int32 [k]) and its state; θ takes the master values."""

    def write_back(self, layer: PrincipalLayer) -> None:
        """W.flat[I] = θ, wherever W lives."""


class DenseStore:
    """Everything whole in this process: plain PyTorch, or DeepSpeed's stage 0 in float32.

    Args:
        optimizer: the Adam that holds θ in its parameter groups; θ is its own master.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    rank, ranks = 0, 1

    def collect(self, layer: PrincipalLayer, owner: int) -> Tensor | None:
        return layer.weight.detach()

    def hand_out(self, layer: PrincipalLayer, owner: int, selection: Selection | None) -> Selection:
        assert selection is not None, "one process owns every matrix"
        return selection

    def agree(self, failure: str, seconds: float) -> list[float]:
        if failure:
            raise ValueError(failure)
        return [seconds]

    def whole_index(self, layer: PrincipalLayer) -> AbstractContextManager[object]:
        return nullcontext()

    def master(self, layer: PrincipalLayer) -> Tensor:
        """Return the tensor that the optimizer updates for this layer."""
        return layer.principal_values

    def read_state(self, layer: PrincipalLayer) -> PrincipalState:
        master = self.master(layer)
        moments = self._optimizer.state.get(master, {})
        # Adam has no state yet for a layer that no gradient has reached.
        exp_avg, exp_avg_sq = (moments.get(key, torch.zeros_like(master)) for key in ("exp_avg", "exp_avg_sq"))
        return PrincipalState(master.detach(), exp_avg, exp_avg_sq)

    @torch.no_grad()
    def replace(self, layer: PrincipalLayer, index: Tensor, state: PrincipalState) -> None:
        master = self.master(layer)
        master.copy_(state.master)
        moments = self._optimizer.state.get(master, {})
        if moments:
            moments["exp_avg"].copy_(state.exp_avg)
            moments["exp_avg_sq"].copy_(state.exp_avg_sq)
        layer.principal_values.copy_(state.master)
        layer.principal_index.copy_(index)

    def write_back(self, layer: PrincipalLayer) -> None:
        put_values(layer.weight, layer.principal_index, layer.principal_values)


@torch.no_grad()
def put_values(weight: Tensor, index: Tensor, values: Tensor) -> None:
    """W.flat[I] = θ, in place; a contiguous weight [m, n], int positions [k], values [k] of any floating dtype."""
    weight.view(-1).index_put_((index,), values.to(weight.dtype))


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
        attachment.driven = True

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
        for layer in self.attachment.layers.values():
            self.store.write_back(layer)
        steps = self.applied_steps + 1
        for group in self._optimizer.param_groups:
            group[APPLIED_STEPS] = steps
        if steps % self.attachment.config.refresh_interval == 0:
            with watch.during(f"refresh at step {steps}"):
                self._refresh(steps)

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
        return Selection(index, weight.reshape(-1)[index.long()])

    def _carry(self, layer: PrincipalLayer, selection: Selection) -> int:
        """Carry the state of one layer over to its new index; return how many entries are new."""
        with self.store.whole_index(layer):
            old_index = layer.principal_index.detach()
            state, replaced = carry_over(old_index, self.store.read_state(layer), selection.index, selection.current)
        self.store.replace(layer, selection.index, state)
        return replaced
