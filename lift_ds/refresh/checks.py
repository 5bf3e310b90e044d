"""What a run checks of itself: that the states are those of the weights, and that every weight is trained."""

from __future__ import annotations

from collections.abc import Mapping

from lift_ds.model.attachment import Attachment
from lift_ds.model.targets import kinds_of
from lift_ds.model.weights import PrincipalWeight
from lift_ds.refresh.store import PrincipalStore
from lift_ds.runtime.logs import get_logger

logger = get_logger()


def require_equal(store: PrincipalStore, weights: Mapping[str, PrincipalWeight], *, write_first: bool) -> None:
    """Check that the weights at the principal entries are the master values, rounded to the weights' dtype.

    DeepSpeed keeps the master values. An option of it that LIFT does not know may keep them in another place.

    Args:
        store: where they are read.
        weights: by name, those to look at.
        write_first: write the trained values back before, in the same pass.

    Raises:
        RuntimeError: on every rank, when they differ in a weight, or a part of its state is missing; names it.
    """
    counts = store.compare(list(weights.values()), write_first=write_first).tolist()
    wrong = []
    for (name, weight), (differing, found) in zip(weights.items(), counts, strict=True):
        if found != weight.entries():
            wrong.append(f"{name} (the state has {found:,} of its {weight.entries():,} entries)")
        elif differing:
            wrong.append(f"{name} (at {differing:,} of {found:,} entries)")
    if wrong:
        raise RuntimeError(
            f"the optimizer's master values are not the trained weights in {len(wrong)} of {len(weights)} matrices or "
            f"stacks, the first of them {wrong[0]}. Nothing was selected and nothing saved. Either another program has "
            "changed weights or state, or an option of DeepSpeed keeps the state in a way that LIFT does not know: "
            "leave that option out and continue from the last checkpoint"
        )


class Untrained:
    """Names the weights that no gradient has reached: after the first step, and once more after the first refresh.

    Args:
        attachment: the managed weights.
        store: how the ranks agree.
    """

    def __init__(self, attachment: Attachment, store: PrincipalStore) -> None:
        self._attachment = attachment
        self._store = store
        self._names = [*attachment.weights]  # that no gradient had reached when it was looked last
        self._looks = 0

    def after_step(self, step: int, *, refreshed: bool) -> None:
        """Look, if it is time to; all ranks call, and then one collective runs.

        Args:
            step: the applied step.
            refreshed: whether it completed a refresh.
        """
        if not self._names or self._looks > 1 or (self._looks == 1 and not refreshed):
            return
        self._looks += 1
        weights = self._attachment.weights
        reached = self._store.on_any_rank([weights[name] in self._attachment.ever_reached for name in self._names])
        self._names = [name for name, found in zip(self._names, reached, strict=True) if not found]
        if self._names:
            logger.warning(
                "after step %d no gradient has reached %d of %d managed weights, which are not trained: %s. The model "
                "reads these weights without calling their layers, or they take no part in the loss; exclude_modules "
                "leaves them out",
                step, len(self._names), len(weights), ", ".join(kinds_of(self._names)),
            )  # fmt: skip
