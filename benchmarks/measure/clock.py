"""A clock for what a device does, which does not make the device wait."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch


class Clock:
    """Marks moments: on a GPU by events in its own order of work, on the host by the host's clock.

    The host runs ahead of a GPU. So the time between two marks is what the work between them took there, with the
    gaps in which the GPU waited for the host.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Mark the moment at which all work given so far is done."""
        if not self._on_gpu:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def seconds(self) -> list[float]:
        """Return the seconds from each mark to the next; waits for the device."""
        if not self._on_gpu:
            return [stop - start for start, stop in itertools.pairwise(self._marks)]
        self._marks[-1].synchronize()
        return [start.elapsed_time(stop) / 1e3 for start, stop in itertools.pairwise(self._marks)]
