"""What a result depends on beside the code: hardware, versions, date."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

Record = dict[str, Any]


def surroundings(packages: Iterable[str], **hardware: Any) -> Record:
    """What a result depends on beside the code: hardware, versions, date.

    Args:
        packages: whose versions matter.
        **hardware: what is to be said of it beyond processor, cores and memory.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": {
            "cpu": _processor(),
            "cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            **hardware,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,  # says which build it is
            **{package: version(package) for package in packages},
        },
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
