"""The device: what it is, with which driver and versions, and how fast its memory is copied."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import torch

from benchmarks.measure.clock import Clock
from benchmarks.measure.records import Record, surroundings

_PACKAGES = ("triton", "deepspeed", "transformers", "peft", "flash_attn")

#: Bytes of the tensor that is copied, at most, and the share of the device's memory that it may take.
_COPIED, _SHARE = 4 * 2**30, 1 / 16


def device_type(asked: str) -> str:
    """Return "cuda" or "cpu"; for "auto" the first where there is such a device."""
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no such device; --device auto takes the host then")
    return asked


def around(device: str, *, small: bool) -> Record:
    """Return what the results depend on beside the code: date, hardware, versions, sizes."""
    cuda: Record = {"device": None, "driver": None}
    if device == "cuda":
        found = torch.cuda.get_device_properties(0)
        cuda = {
            "device": found.name,
            "device_memory_gib": round(found.total_memory / 2**30, 1),
            "multiprocessors": found.multi_processor_count,
            "driver": _driver(),
        }
    content = surroundings(_PACKAGES, **cuda)
    content["versions"]["cuda"] = torch.version.cuda or getattr(torch.version, "hip", None)
    return {**content, "sizes": "small" if small else "full"}


def slug(content: Record) -> str:
    """Return the name of the device for a file's: "h100-80gb-hbm3"; "cpu" where there is none."""
    name = content["hardware"]["device"] or "cpu"
    words = [word for word in re.findall(r"[a-z0-9]+", name.lower()) if word not in ("nvidia", "amd", "instinct")]
    return "-".join(words + ["small"] * (content["sizes"] == "small" and name != "cpu"))


def total_memory(device: str) -> int | None:
    """Return the bytes of the device's memory; None on the host, whose memory is not what is looked at."""
    return torch.cuda.get_device_properties(0).total_memory if device == "cuda" else None


def copy_rate(device: str, largest: int = _COPIED) -> Record:
    """Copy a large tensor within the device's memory.

    Args:
        device: "cuda" or "cpu".
        largest: bytes of the tensor, at most.

    Returns:
        Bytes of the tensor, the median's seconds, and bytes read and written a second.
    """
    memory = total_memory(device)
    size = min(largest, int(memory * _SHARE)) if memory else largest
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    clock = Clock(source.device)
    clock.mark()
    for _ in range(11):
        target.copy_(source)
        clock.mark()
    seconds = sorted(clock.seconds())[5]
    return {"bytes": source.nbytes, "median_seconds": seconds, "bytes_per_second": 2 * source.nbytes / seconds}


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        return said.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        pass
    try:
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", Path("/proc/driver/nvidia/version").read_text())
        return found[0] if found else "unknown"
    except OSError:
        return "unknown"
