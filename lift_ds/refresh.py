"""The refresh: select again from the current weights, carry the state over; and the clock that says when.

`Driver` is what runs after every applied optimizer step. Where weights, indices and states live is the business of a
`PrincipalStore`: one process keeps them whole (`DenseStore`), DeepSpeed spreads them (`lift_ds.zero`).
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lift_ds.attachment import Attachment
from lift_ds.config import LiftConfig
from lift_ds.layers import PrincipalLayer
from lift_ds.logs import get_logger
from lift_ds.selection import PrincipalState, carry_over, principal_indices

logger = get_logger()

#: Key in every parameter group that counts the applied steps: part of each optimizer checkpoint, whatever wraps it.
APPLIED_STEPS = "lift_steps"


class PrincipalStore(Protocol):
    """Where the weights, indices, master values and moments of a run live."""

    def whole(self, layer: PrincipalLayer) -> AbstractContextManager[object]:
        """Make `layer.weight` and `layer.principal_index` whole on every rank within the context."""

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

    def whole(self, layer: PrincipalLayer) -> AbstractContextManager[object]:
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

    def __str__(self) -> str:
        return (
            f"LIFT refresh at step {self.step}: {self.matrices} matrices, {self.entries:,} entries, "
            f"churn {self.churn:.1%}, {self.seconds:.2f} s"
        )


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
        attachment.driven = True

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
            self._refresh(steps)

    def _refresh(self, step: int) -> None:
        start = time.perf_counter()
        replaced = sum(self._refresh_layer(name, layer) for name, layer in self.attachment.layers.items())
        entries = self.attachment.entries()
        report = RefreshReport(
            step, len(self.attachment.layers), entries, replaced / entries, time.perf_counter() - start
        )
        self.reports.append(report)
        logger.info("%s", report)

    def _refresh_layer(self, name: str, layer: PrincipalLayer) -> int:
        """Select again in one layer and return how many entries are new."""
        with self.store.whole(layer):
            weight = layer.weight.detach()
            index = select(name, weight, self.attachment.config)
            state, replaced = carry_over(layer.principal_index.detach(), self.store.read_state(layer), index, weight)
        self.store.replace(layer, index, state)
        return replaced
