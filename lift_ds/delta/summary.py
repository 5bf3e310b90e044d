"""What a delta holds, in figures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from lift_ds.delta.export import progress
from lift_ds.delta.file import REMOVED, SAME, Change, DeltaFile


@dataclass(frozen=True)
class Summary:
    """What a delta says of itself.

    Args:
        base: folder or name of the model it is of, as it was given.
        changes: tensor -> what became of it.
        changed: entries that changed, of all tensors.
        entries: of all tensors of the tuned model.
        size: bytes of the file.
    """

    base: str
    changes: dict[str, Change]
    changed: int
    entries: int
    size: int


def inspect_delta(file: str | Path) -> Summary:
    """Read a delta and check all its checksums.

    Args:
        file: of the delta.

    Raises:
        ValueError: it is no delta, or is damaged.
    """
    delta = DeltaFile(file)
    stored = list(delta.stored())
    with progress(len(stored), "reading") as shown:
        for name in stored:
            delta.read(name)
            shown.update()
    return summary_of(delta)


def summary_of(delta: DeltaFile) -> Summary:
    """Return what a delta's header says."""
    left = [change for change in delta.changes.values() if change.kind != REMOVED]
    changed, entries = sum(change.changed for change in left), sum(math.prod(change.shape) for change in left)
    return Summary(delta.base, delta.changes, changed, entries, delta.path.stat().st_size)


def headline(summary: Summary) -> str:
    """Return how much changed, in one line."""
    touched = sum(change.kind != SAME for change in summary.changes.values())
    return (
        f"{summary.changed:,} of {summary.entries:,} entries changed ({_share(summary.changed, summary.entries)}), "
        f"in {touched} of {len(summary.changes)} tensors; {summary.size / 1e6:,.1f} MB"
    )


def table(summary: Summary) -> str:
    """Return the figures as lines: the whole, then each tensor that changed."""
    lines = [f"base: {summary.base}", headline(summary)]
    changed = {name: change for name, change in summary.changes.items() if change.kind != SAME}
    width = max((len(name) for name in changed), default=0)
    for name, change in changed.items():
        share = _share(change.changed, math.prod(change.shape))
        added = ", not in the base" if change.base is None else ""
        lines.append(f"{name:{width}}  {change.dtype:4} {[*change.shape]}  {share:>6}  {change.kind}{added}")
    return "\n".join([*lines, "all checksums hold"])


def _share(part: int, whole: int) -> str:
    return f"{part / max(1, whole):.2%}"
