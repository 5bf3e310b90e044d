"""What a process finds out about its own node, without a word to any other."""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import socket
from pathlib import Path
from typing import Any

import psutil
import torch

from lift_ds.doctor import devices
from lift_ds.doctor.limits import within
from lift_ds.runtime.versions import package_versions
from lift_ds.training.launcher import own_address

PACKAGES = ("torch", "deepspeed", "transformers", "lift_ds")

#: What of the package is compared beside its version: files that differ under one version.
SOURCES = "files of lift_ds"

#: Seconds within which the driver has to answer; a broken one may not even let its caller be killed.
_DEVICES = 30.0


def examine_node(one_machine: bool) -> dict[str, Any]:
    """Return the facts of this node.

    Args:
        one_machine: whether it is the only one.

    Returns:
        "versions": name -> version. "shm": free bytes of /dev/shm, None where there is none. "locked": bytes that may
        be locked in memory, None for any number. "devices", "infiniband": see `devices`. "backend" of
        torch.distributed. "address", "interface": by which it would be reached, "" where there is none. "addresses":
        all of IPv4. "troubles": what could not be found out.
    """
    troubles = []
    try:
        gpus = within(_DEVICES, devices.devices, "nvidia-smi")
    except OSError as error:
        gpus = []
        troubles.append(str(error))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    address = announced_address(backend, one_machine)
    return {
        "versions": versions(gpus),
        "shm": free_shared_memory(),
        "locked": locked_memory(),
        "devices": gpus,
        "infiniband": devices.infiniband(),
        "backend": backend,
        "address": address,
        "interface": interface_of(address),
        "addresses": [entry.address for entries in psutil.net_if_addrs().values() for entry in entries
                      if entry.family == socket.AF_INET],
        "troubles": troubles,
    }  # fmt: skip


def versions(gpus: list[dict[str, Any]]) -> dict[str, str]:
    """Return the versions that have to be the same on all nodes.

    Args:
        gpus: of this node.
    """
    found = {"python": platform.python_version(), **package_versions(PACKAGES), SOURCES: sources()}
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    if gpus:
        found["driver"] = gpus[0]["driver"]
    return found


def sources() -> str:
    """Return eight digits that change with any Python file of this package."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:8]


def free_shared_memory() -> int | None:
    """Return the free bytes of /dev/shm, None where there is no such folder."""
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def locked_memory() -> int | None:
    """Return how many bytes a process may lock in memory, None for any number."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def announced_address(backend: str, one_machine: bool) -> str:
    """Return the IPv4 address that the others are given for this node, "" where it has none.

    Gloo takes that of the interface in GLOO_SOCKET_IFNAME, else what the host's name resolves to. NCCL takes that of
    NCCL_SOCKET_IFNAME, else of the first interface that is up.

    Args:
        backend: of torch.distributed.
        one_machine: whether there is no other node.
    """
    try:
        if backend == "gloo" and not os.environ.get("GLOO_SOCKET_IFNAME") and not one_machine:
            return socket.gethostbyname(socket.gethostname())
        return own_address(one_machine)
    except (OSError, ValueError):
        return ""


def interface_of(address: str) -> str:
    """Return the interface that has an address, "" where none has."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            return name
    return ""
