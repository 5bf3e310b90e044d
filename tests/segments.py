"""The shared memory of DeepSpeed's CPU kernel: 68 MB a rank, which outlive the ranks.

Nothing in DeepSpeed unlinks them. They are called after the user, the address and port the ranks meet at, and the rank.
"""

from __future__ import annotations

import os
from pathlib import Path


def segments_of(port: int | str) -> list[Path]:
    """Find what the ranks that met at a port have left."""
    return sorted(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*_{port}_*"))


def remove_segments(port: int | str) -> None:
    """Remove what the ranks that met at a port have left; for after their end."""
    for segment in segments_of(port):
        segment.unlink(missing_ok=True)
