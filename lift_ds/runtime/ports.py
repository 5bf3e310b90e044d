"""A free port, for the address where the ranks of a run meet."""

from __future__ import annotations

import socket


def free_port() -> int:
    """Return a port that nothing listens on now, at any address of this machine: other hosts may come to it."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
