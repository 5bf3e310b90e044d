"""Which way NCCL has taken, read off what it says under NCCL_DEBUG=INFO."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

_NETWORK = re.compile(r"NCCL INFO .*Using network (?P<name>\S+)")
_ADAPTERS = re.compile(r"NCCL INFO NET/(?P<name>\w+) : Using (?P<adapters>.*)")
_ADAPTER = re.compile(r"\[\d+\](?P<name>[^:\s]+)")
_CHANNEL = re.compile(r"NCCL INFO Channel .* via (?P<way>P2P|SHM|NET)\b")

#: What NCCL calls TCP.
SOCKET = "Socket"


def read(text: str) -> dict[str, Any]:
    """Read a log of NCCL.

    Args:
        text: of one process.

    Returns:
        "network": what NCCL calls the network it takes between nodes ("IB", "Socket", a plugin's name), "" where it
        does not say. "adapters": the names of those it has found for it. "ways": "P2P", "SHM" or "NET" -> channels.
    """
    networks = [found["name"] for found in _NETWORK.finditer(text)]
    network = networks[-1] if networks else ""
    adapters = {found["name"]: _ADAPTER.findall(found["adapters"]) for found in _ADAPTERS.finditer(text)}
    ways = Counter(found["way"] for found in _CHANNEL.finditer(text))
    return {"network": network, "adapters": adapters.get(network, []), "ways": dict(ways)}
