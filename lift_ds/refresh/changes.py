"""What training has changed in the weights: which entries, and what they were before.

    first selection    4 7 9    base: 4 7 9      left: -        base: the weights there before training
    refresh, step 3    4 8 9    base: 4 7 8 9    left: 7 (3)    left: what left the selection, and after which step
    refresh, step 6    4 7 9    base: 4 7 8 9    left: 8 (6)    7 is trained again

`base_weights` exchanges the base with what stands in the weights. `changed_entries` gives the selection, and what left
it. Each rank records what lies in the part of a weight that it holds: all of it in ZeRO 0 to 2, its shard in ZeRO-3.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lift_ds.index.encoding import CompactIndex, stacked
from lift_ds.model.attachment import Attachment, require_attachment
from lift_ds.model.partition import logical_shape, partition_of
from lift_ds.model.weights import PrincipalWeight
from lift_ds.refresh.entries import Entries, Part, contained
from lift_ds.refresh.store import PrincipalStore
from lift_ds.runtime.logs import get_logger
from lift_ds.runtime.ranks import rank_and_count

logger = get_logger()

#: Most refreshes of a weight that are told apart: their numbers take 2 bytes.
_MOST_REFRESHES = 2**15 - 1


class ChangedEntries(NamedTuple):
    """What has changed in one parameter.

    Attributes:
        name: as in the state dict of the plain model.
        shape: of the whole parameter.
        indices: flat row-major positions, ascending, int32, or int64 in a parameter of more than 2^31 entries; None
            where `values` are all of it.
        values: what stands there now, flat, in the dtype of the parameter.
    """

    name: str
    shape: torch.Size
    indices: Tensor | None
    values: Tensor


@dataclass
class Left:
    """What has left the selection of one weight, each entry once.

    Args:
        entries: with the number of the refresh at which each left last, int16.
        steps: of the refreshes, the applied steps after which they were; the same on all ranks.
    """

    entries: Entries
    steps: list[int] = field(default_factory=list)

    def renew(self, old: Tensor, new: Tensor, step: int) -> None:
        """Take note of a refresh.

        Args:
            old: the selection before, as far as it lies in this part, ascending.
            new: the selection after it, likewise.
            step: the applied step.
        """
        if len(self.steps) >= _MOST_REFRESHES:  # two become one, which is the later one
            self.steps = self.steps[1::2] + self.steps[-1:] * (len(self.steps) % 2)
            self.entries = Entries(self.entries.part, self.entries.index, self.entries.numbers // 2)
        dropped = old[~contained(old, new)]
        number = torch.full(dropped.shape, len(self.steps), dtype=torch.int16, device=dropped.device)
        self.entries = self.entries.without(new).with_more(dropped, number)
        self.steps.append(step)

    def after(self, step: int) -> Tensor | None:
        """Return the positions of what left after a step; None where nothing has on any rank."""
        first = bisect_right(self.steps, step)
        return None if first == len(self.steps) else self.entries.positions()[self.entries.numbers >= first]


class Changes:
    """The records of this rank.

    Args:
        attachment: the managed weights, whose selection is the first one.
        store: where they live.

    Attributes:
        begun: whether a step has been made since, or a record was loaded.
        base: name of a weight -> the entries ever trained, with the weights there before training; None where nobody
            asked for it, or it cannot be known.
        dense: name of a parameter trained in full -> the part that this rank holds, before training, and its first
            flat position; beside `base`.
        left: name of a weight -> what has left its selection; None where nobody asked for it.
        left_since: the applied step from which that is known.
    """

    def __init__(self, attachment: Attachment, store: PrincipalStore) -> None:
        self._attachment = attachment
        self._store = store
        self.forget()

    def forget(self) -> None:
        """Be as before the first step."""
        self.begun = False
        self.base: dict[str, Entries] | None = None
        self.dense: dict[str, tuple[Tensor, int]] = {}
        self.left: dict[str, Left] | None = None
        self.left_since = 0

    def begin(self, step: int) -> None:
        """Record the first selections, with the weights as they are before the first step; all ranks call.

        Args:
            step: applied steps. Where there were some, the weights before training are not known.
        """
        self.begun, config = True, self._attachment.config
        if config.keep_base and step:
            logger.warning("keep_base: training goes on after step %d without a record of the weights before it", step)
        elif config.keep_base:
            self.base = {}
            for weight in self._attachment.weights.values():
                with self._store.whole_index(weight):
                    self._add_to_base(weight, weight.principal_index)
            for name, parameter in self._attachment.dense.items():
                with self._store.held(parameter, write=False) as (piece, start):
                    self.dense[name] = piece.clone(), start
        if config.track_changes:
            self.left, self.left_since = {}, step

    def renew(self, weight: PrincipalWeight, words: Sequence[Tensor], step: int) -> None:
        """Take note of the new selection of a weight, which holds the trained values; all ranks call.

        Where changes are tracked, ZeRO-3 gathers the old index.

        Args:
            weight: it has its old selection still.
            words: the new index of each of its matrices, encoded, whole.
            step: the applied step after which it was made.
        """
        if self.base is None and self.left is None:
            return
        new = CompactIndex(stacked(words, weight.layout), weight.layout).positions()
        if self.base is not None:
            self._add_to_base(weight, new)
        if self.left is not None:
            part, device = self.part_of(weight)
            if weight.name not in self.left:
                none = new.new_empty(0, device=device)
                self.left[weight.name] = Left(Entries.of(part, none, none.short()))
            with self._store.whole_index(weight):
                old = part.of(weight.principal_index).to(device)
                self.left[weight.name].renew(old, part.of(new).to(device), step)

    def part_of(self, weight: PrincipalWeight) -> tuple[Part, torch.device]:
        """Return which part of a weight this rank holds, and where."""
        with self._store.held(weight.weight, write=False) as (piece, start):
            return self._part(weight, piece, start), piece.device

    def _part(self, weight: PrincipalWeight, piece: Tensor, start: int) -> Part:
        return Part(start, start + piece.numel(), weight.layout.columns, weight.layout.long)

    @torch.no_grad()
    def _add_to_base(self, weight: PrincipalWeight, index: Tensor) -> None:
        """Record what of a selection was never trained, with the weights there."""
        assert self.base is not None
        with self._store.held(weight.weight, write=False) as (piece, start):
            part = self._part(weight, piece, start)
            own = part.of(index).to(piece.device)
            known = self.base.get(weight.name)
            new = own if known is None else own[~contained(own, known.positions())]
            values = piece[(new - start).long()]
            self.base[weight.name] = Entries.of(part, new, values) if known is None else known.with_more(new, values)

    @contextmanager
    def exchanged(self) -> Iterator[None]:
        """Within the context the weights before training stand in their places, and the trained ones in the record."""
        done: list[str] = []
        try:
            self._exchange([*(self.base or {}), *self.dense], done)
            yield
        finally:
            self._exchange(list(done), [])

    @torch.no_grad()
    def _exchange(self, names: list[str], done: list[str]) -> None:
        """Exchange what is recorded of some parameters with what stands there; those that are done are added."""
        assert self.base is not None or not names
        for name in names:
            if self.base is not None and name in self.base:
                with self._store.held(self._attachment.weights[name].weight, write=True) as (piece, _):
                    self.base[name] = self.base[name].exchange(piece)
            else:
                with self._store.held(self._attachment.dense[name], write=True) as (piece, start):
                    before = piece.clone()
                    piece.copy_(self.dense[name][0])
                    self.dense[name] = before, start
            done.append(name)
        if names:
            self._store.drop_gathered()

    @torch.no_grad()
    def since(self, step: int) -> Iterator[ChangedEntries]:
        """Yield what has changed since an applied step before the last; all ranks iterate to the end."""
        assert self.left is not None
        for name, weight in self._attachment.weights.items():
            positions, values = self._store.trained(weight)
            left = self.left.get(name)
            gone = left.after(step) if left is not None else None
            if gone is not None:
                more_positions, more_values = self._of_all_parts(weight, gone)
                positions, order = torch.cat([positions, more_positions.to(positions.device)]).sort()
                values = torch.cat([values, more_values.to(values.device)])[order]
            yield ChangedEntries(weight.full_name, logical_shape(weight.weight), positions, values)
        for name, parameter in self._attachment.dense.items():
            with partition_of(parameter).gathered([parameter]):
                whole = parameter.detach().reshape(-1).clone()
            yield ChangedEntries(name, logical_shape(parameter), None, whole)

    def _of_all_parts(self, weight: PrincipalWeight, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return positions, and the weights there, of all ranks; each gives those in the part that it holds."""
        with self._store.held(weight.weight, write=False) as (piece, start):
            values = piece[(positions - start).long()]
        return self._store.of_all_parts(weight, positions), self._store.of_all_parts(weight, values)


def applied_steps(model: nn.Module) -> int:
    """Return how many optimizer steps training has applied to a model, over restarts.

    Steps that were skipped, for an overflow, do not count.

    Args:
        model: with LIFT attached, or a wrapper of it.

    Raises:
        ValueError: LIFT is not attached.
    """
    driver = require_attachment(model).driver
    return 0 if driver is None else driver.applied_steps


def changed_entries(
    model: nn.Module, since: int | None = None, *, on_all_ranks: bool = True
) -> Iterator[ChangedEntries]:
    """Yield what training has changed, parameter by parameter: what another copy of the model needs to follow it.

    Call it between two steps. All ranks call, and iterate to the end. What is selected now is given, and what has left
    the selection since then; entries that a refresh has just selected are among them, with their weights as they were.
    Parameters that are trained in full are given in full, with `indices=None`.

    In ZeRO 1 and 2 the index of a weight is gathered, in ZeRO-3 also its principal values. After a refresh ZeRO-3
    gathers what has left the selection, by the ranks that hold it.

    Args:
        model: with LIFT attached by `track_changes=True`, or a wrapper of it.
        since: `lift_ds.applied_steps(model)` at the time from which changes are wanted; None for all of training.
        on_all_ranks: False gives them to rank 0 alone. The other ranks iterate over nothing, and take part.

    Returns:
        One at a time `ChangedEntries(name, shape, indices, values)`, on the device of the parameter; nothing where no
        step was applied since then.

    Raises:
        ValueError: LIFT is not attached, `track_changes` is not set, or `since` is no step that is known.
        RuntimeError: within `base_weights`.
    """
    attachment = require_attachment(model)
    attachment.require_trained()
    if not attachment.config.track_changes:
        raise ValueError(
            "track_changes=False: nothing records which entries training has changed; give track_changes=True to "
            "LiftConfig before training"
        )
    done, driver = applied_steps(model), attachment.driver
    first = 0 if driver is None else driver.changes.left_since if driver.changes.begun else done
    if since is not None and since > done:
        raise ValueError(f"since={since} is a step to come: {done} are applied")
    if (since or 0) < first:
        raise ValueError(f"since={since}: track_changes has recorded from step {first} on; give that or a later one")
    return _nothing() if since == done or not done else _given(driver.changes.since(since or 0), on_all_ranks)


def _nothing() -> Iterator[ChangedEntries]:
    yield from ()


def _given(changes: Iterator[ChangedEntries], on_all_ranks: bool) -> Iterator[ChangedEntries]:
    wanted = on_all_ranks or rank_and_count()[0] == 0
    for change in changes:
        if wanted:
            yield change


@contextmanager
def base_weights(model: nn.Module) -> Iterator[None]:
    """Give a model the weights that it had before training, within the context; then it has the trained ones again.

    So the reference of DPO or GRPO needs no second copy of the model. All ranks enter and leave it; no collective runs.
    The record of the weights is exchanged with what stands in the model, in place. Nothing can be trained or saved in a
    checkpoint within the context: use `torch.no_grad()` there.

    Args:
        model: with LIFT attached by `keep_base=True`, or a wrapper of it.

    Raises:
        ValueError: LIFT is not attached, `keep_base` is not set, or training went on from somewhere without the record.
    """
    attachment = require_attachment(model)
    require_base(attachment)
    if attachment.shows_base:
        yield
        return
    attachment.shows_base = True
    try:
        with nullcontext() if attachment.driver is None else attachment.driver.changes.exchanged():
            yield
    finally:
        attachment.shows_base = False


def require_base(attachment: Attachment) -> None:
    """Check that the weights before training are known.

    Raises:
        ValueError: they are not.
    """
    if not attachment.config.keep_base:
        raise ValueError(
            "keep_base=False: nothing records the weights before training; give keep_base=True to LiftConfig before it"
        )
    driver = attachment.driver
    if driver is not None and driver.applied_steps and driver.changes.base is None:
        raise ValueError(
            "keep_base: training went on from a checkpoint or a state dict without the record of the weights before "
            "it; go on from a checkpoint that was saved with keep_base=True, or keep a copy of the model"
        )
