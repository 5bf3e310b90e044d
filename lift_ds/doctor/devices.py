"""The devices of this node and its network adapters: asked of the driver and of the kernel, without using a device."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

_SECONDS = 20.0

_QUERY = ("index", "name", "driver_version", "memory.total", "memory.used")

#: Class of an InfiniBand controller on the PCI bus.
_INFINIBAND = "0x0207"


def devices() -> list[dict[str, Any]]:
    """Return the GPUs that this process may use, by nvidia-smi: index, name, driver, total and used bytes.

    Raises:
        OSError: nvidia-smi is there and fails; says what it said.
    """
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        asked = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise OSError(f"nvidia-smi has not answered within {_SECONDS:g} s") from None
    if asked.returncode != 0:
        raise OSError(f"nvidia-smi: {(asked.stdout + asked.stderr).strip().splitlines()[0]}")
    return visible(parse(asked.stdout), os.environ.get("CUDA_VISIBLE_DEVICES"))


def parse(text: str) -> list[dict[str, Any]]:
    """Read nvidia-smi's table.

    Args:
        text: a line a device, with the columns that are asked for.
    """
    found = []
    for line in text.splitlines():
        index, name, driver, total, used = (cell.strip() for cell in line.split(","))
        found.append(
            {"index": int(index), "name": name, "driver": driver, "total": _mebibytes(total), "used": _mebibytes(used)}
        )
    return found


def _mebibytes(text: str) -> int | None:
    return int(text) * 2**20 if text.isdecimal() else None  # "[N/A]" where memory is shared with the host


def visible(found: list[dict[str, Any]], chosen: str | None) -> list[dict[str, Any]]:
    """Return those devices that CUDA_VISIBLE_DEVICES leaves.

    Args:
        found: all of the node.
        chosen: the variable; None where it is not set. Identifiers in place of numbers leave all.
    """
    numbers = [] if chosen is None else [word.strip() for word in chosen.split(",")]
    if not numbers or not all(number.isdecimal() for number in numbers):
        return found
    return [device for device in found if str(device["index"]) in numbers]


def infiniband(root: str = "/sys") -> list[str]:
    """Return the InfiniBand or RoCE adapters of this node; "without driver" where one is on the bus alone.

    Args:
        root: where the kernel shows its devices.
    """
    known = Path(root, "class/infiniband")
    if known.is_dir() and (names := sorted(entry.name for entry in known.iterdir())):
        return names
    for path in Path(root, "bus/pci/devices").glob("*/class"):
        if path.read_text().startswith(_INFINIBAND):
            return [f"{path.parent.name} without driver"]
    return []
