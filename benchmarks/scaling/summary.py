"""The repetitions of each cell put together, and what follows: speed-up, efficiency, the link's limit."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from benchmarks.scaling.cells import BASE, METHODS, NO_LINK, PROBE, STRONG, Cell
from benchmarks.scaling.table import OK, Row, cell_of

#: Columns whose median over the runs of a cell is reported.
_MEDIANS = (
    "predicted_step_seconds", "predicted_wire_bytes", "peak_bytes", "predicted_peak_bytes", "refresh_seconds",
    "predicted_refresh_seconds", "refresh_wire_bytes",
)  # fmt: skip


@dataclass(frozen=True)
class Summary:
    """A cell over all its repetitions.

    Args:
        cell: of repetition 0.
        repetitions: how many.
        seconds: of a step, the median of the runs' medians.
        fastest: the fastest step of all runs.
        slowest: the slowest one.
        wire: bytes that a node sends or receives in a step, whichever is more.
        median: column of the table -> median over the runs; None where nothing was measured, counted or predicted.
    """

    cell: Cell
    repetitions: int
    seconds: float
    fastest: float
    slowest: float
    wire: float
    median: dict[str, float | None]

    @property
    def predicted(self) -> float | None:
        """Seconds of a step."""
        return self.median["predicted_step_seconds"]

    @property
    def limit(self) -> float | None:
        """Seconds that the link alone takes for the bytes counted on it; None where its rate was not given."""
        return 8e-9 * self.wire / self.cell.gbit if self.cell.gbit and self.cell.link != NO_LINK else None


def summarise(rows: Iterable[Row]) -> list[Summary]:
    """Put the repetitions of each cell together; probes and failed runs are left out."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        if row["status"] == OK and row["method"] != PROBE:
            groups.setdefault(replace(cell_of(row), repetition=0).key, []).append(row)
    found = [_summary(group) for group in groups.values()]
    return sorted(found, key=_order)


def _order(summary: Summary) -> tuple[object, ...]:
    cell = summary.cell
    rate = cell.gbit or float("inf")
    return (
        str(cell.sizes), cell.stage, cell.scaling != BASE, cell.scaling, cell.nodes, cell.ranks, rate, cell.link,
        cell.tokens, METHODS.index(cell.method),
    )  # fmt: skip


def _summary(rows: Sequence[Row]) -> Summary:
    values = {name: [row[name] for row in rows if row[name] is not None] for name in _MEDIANS}
    return Summary(
        cell=replace(cell_of(rows[0]), repetition=0),
        repetitions=len(rows),
        seconds=statistics.median(row["step_seconds"] for row in rows),
        fastest=min(row["step_seconds_min"] for row in rows),
        slowest=max(row["step_seconds_max"] for row in rows),
        wire=statistics.median(max(row["wire_bytes_sent"], row["wire_bytes_received"]) for row in rows),
        median={name: statistics.median(found) if found else None for name, found in values.items()},
    )


@dataclass(frozen=True)
class Scaling:
    """A cell against one rank.

    Args:
        summary: of the cell.
        base: of one rank with as many tokens as the cell has in a step (strong) or on a rank (weak).
    """

    summary: Summary
    base: Summary

    @property
    def measured(self) -> float:
        """Speed-up that was measured."""
        return self._speed_up(self.base.seconds, self.summary.seconds)

    @property
    def predicted(self) -> float | None:
        """Speed-up that was predicted."""
        if self.base.predicted is None or self.summary.predicted is None:
            return None
        return self._speed_up(self.base.predicted, self.summary.predicted)

    def efficiency(self, speed_up: float) -> float:
        """Share of the speed-up that as many ranks could have: t1 / (N tN) in strong scaling, t1 / tN in weak."""
        return speed_up / self.summary.cell.ranks

    def _speed_up(self, alone: float, together: float) -> float:
        """Tokens a second of all ranks over those of one: t1 / tN in strong scaling, N t1 / tN in weak."""
        return (1 if self.summary.cell.scaling == STRONG else self.summary.cell.ranks) * alone / together


def scalings(found: Sequence[Summary]) -> list[Scaling]:
    """Return every cell of several ranks beside its base, where there is one."""
    bases = {_base_key(one.cell, one.cell.tokens): one for one in found if one.cell.ranks == 1}
    compared = []
    for one in found:
        cell = one.cell
        tokens = cell.tokens * (cell.ranks if cell.scaling == STRONG else 1)
        base = bases.get(_base_key(cell, tokens))
        if cell.ranks > 1 and base is not None:
            compared.append(Scaling(one, base))
    return compared


def _base_key(cell: Cell, tokens: int) -> tuple[object, ...]:
    return cell.method, cell.stage, cell.sizes, tokens


@dataclass(frozen=True)
class Comparison:
    """LIFT against another method in the same cell.

    Args:
        lift: LIFT's.
        other: the other's.
    """

    lift: Summary
    other: Summary

    @property
    def faster(self) -> float:
        """How many times as fast LIFT's step is."""
        return self.other.seconds / self.lift.seconds

    @property
    def predicted_faster(self) -> float | None:
        """The same as predicted."""
        if self.other.predicted is None or self.lift.predicted is None:
            return None
        return self.other.predicted / self.lift.predicted

    @property
    def fewer_bytes(self) -> float | None:
        """How many times as many bytes the other has on the wire; None on one rank."""
        return self.other.wire / self.lift.wire if self.lift.cell.ranks > 1 else None


def comparisons(found: Sequence[Summary]) -> list[Comparison]:
    """Return LIFT beside each other method, cell by cell."""
    lifts = {replace(one.cell, method="").key: one for one in found if one.cell.method == "lift"}
    return [
        Comparison(lifts[key], one)
        for one in found
        if one.cell.method != "lift" and (key := replace(one.cell, method="").key) in lifts
    ]
