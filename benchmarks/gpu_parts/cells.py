"""Cells: what a part of the benchmarks on a device consists of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks.measure.records import Record

#: States of a cell in the results. One that failed is tried again by the next run, the others are done.
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


class SkippedError(Exception):
    """There is nothing to do for a cell on this machine; the message says why."""


@dataclass(frozen=True)
class Cell:
    """One thing to be checked or measured.

    Args:
        name: unique within its part.
        run: called with the type of the device ("cuda" or "cpu") and `arguments`; returns what it found, raises
            `SkippedError` where there is nothing to do, and anything else where it failed. A function of a module, so
            that another process finds it.
        arguments: of `run`.
        expected: seconds that it takes on a device, rather too many; it is not begun with less time left.
        limit: seconds after which it counts as hung.
    """

    name: str
    run: Callable[..., Record]
    arguments: tuple[object, ...] = ()
    expected: float = 20.0
    limit: float = 120.0


@dataclass(frozen=True)
class Batch:
    """Cells that share a process, one after the other; after one that failed the rest have a fresh one.

    Args:
        cells: in their order.
        group: whether the process is the one rank of a process group (NCCL on a GPU, gloo on the host).
    """

    cells: Sequence[Cell]
    group: bool = False


class Part(Protocol):
    """A module of this package with one of the parts."""

    #: Modules that its cells import. Where processes are forked, they are imported once, before.
    IMPORTS: Sequence[str]

    @staticmethod
    def batches(device: str, small: bool) -> list[Batch]:
        """Return what is to be run.

        Args:
            device: "cuda" or "cpu".
            small: whether only to see that it runs.
        """

    @staticmethod
    def report(cells: dict[str, Record], *, measured: bool) -> str:
        """Return a table of what was found.

        Args:
            cells: those that were run.
            measured: whether the figures are those of a device.
        """

    @staticmethod
    def conclude(cells: dict[str, Record]) -> Record:
        """Return what follows from the cells together, for the file of results."""

    @staticmethod
    def budgets(cells: dict[str, Record]) -> list[Record]:
        """Judge the goals for which the cells are there."""
