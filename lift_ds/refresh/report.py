"""What refreshes did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lift_ds.model.attachment import require_attachment
from lift_ds.selection.select import fallback_note


@dataclass(frozen=True)
class RefreshReport:
    """What one refresh, or a part of one, did.

    Args:
        step: after which applied step.
        matrices: how many.
        entries: selected in all.
        replaced: entries that had not been selected before.
        seconds: in all.
        selection_seconds: those each rank spent on receiving, factoring and selecting.
        fell_back: matrices in which "chebyshev" did not reach its tolerance, so that "gram" was used.
        estimate: share of a selection that may differ from the exact one, by the solver's own estimate; the largest of
            all matrices, 0 where every solver was exact.
        parts: how many it was made in.
    """

    step: int
    matrices: int
    entries: int
    replaced: int
    seconds: float
    selection_seconds: tuple[float, ...]
    fell_back: int = 0
    estimate: float = 0.0
    parts: int = 1

    @property
    def churn(self) -> float:
        """Share of the entries that was replaced."""
        return self.replaced / self.entries

    @staticmethod
    def of(parts: Sequence[RefreshReport]) -> RefreshReport:
        """Return the report of a refresh that was made in parts."""
        return RefreshReport(
            step=parts[-1].step,
            matrices=sum(part.matrices for part in parts),
            entries=sum(part.entries for part in parts),
            replaced=sum(part.replaced for part in parts),
            seconds=sum(part.seconds for part in parts),
            selection_seconds=tuple(map(sum, zip(*(part.selection_seconds for part in parts), strict=True))),
            fell_back=sum(part.fell_back for part in parts),
            estimate=max(part.estimate for part in parts),
            parts=len(parts),
        )

    def __str__(self) -> str:
        text = (
            f"LIFT refresh at step {self.step}: {self.matrices} matrices, {self.entries:,} entries, "
            f"churn {self.churn:.1%}, {self.seconds:.2f} s"
        )
        if self.parts > 1:
            text += f" in {self.parts} parts"
        if len(self.selection_seconds) > 1:
            slowest = max(range(len(self.selection_seconds)), key=self.selection_seconds.__getitem__)
            text += f" (selection on the slowest rank, {slowest}: {self.selection_seconds[slowest]:.2f} s)"
        if self.estimate:
            text += f", selections exact up to an estimated {self.estimate:.2%}"
        return text + fallback_note(self.fell_back)


def refreshes(model: nn.Module) -> list[RefreshReport]:
    """Return what the refreshes of this process did, oldest first.

    Args:
        model: the model LIFT is attached to, or a wrapper of it such as DeepSpeed's engine.

    Returns:
        A report for each; empty before the first, and where no optimizer is bound yet.

    Raises:
        ValueError: when LIFT is not attached.
    """
    driver = require_attachment(model).driver
    return [] if driver is None else list(driver.refreshes)
