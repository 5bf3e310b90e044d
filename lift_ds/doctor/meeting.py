"""How the processes of the doctor exchange what they found: through the store of torch.distributed, before any group.

A store needs every process to reach rank 0 and no other, so that what is wrong between two others can be told.
Rank 0 waits for each of them for a limited time, and goes on without those that have not come.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist

from lift_ds.training import rendezvous

#: Seconds between two looks at the store, and that the end may take.
_INTERVAL, _END = 0.05, 5.0


class Lost(Exception):
    """Rank 0, or its store, does not answer."""


class Meeting:
    """The processes that meet.

    Args:
        store: through which they exchange; served by rank 0, or by torchrun.
        rank: of this process.
        count: how many there are.
        address: where the store is served, "HOST:PORT"; "" for one process.
        limit: seconds within which all have to come.
    """

    def __init__(self, store: dist.Store, rank: int, count: int, address: str, limit: float) -> None:
        self.store, self.rank, self.count, self.address, self.limit = store, rank, count, address, limit
        # torchrun's store outlives a failed attempt.
        self._prefix = f"lift_ds/doctor/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"

    def give(self, phase: str, value: Any) -> None:
        """Hand something to rank 0.

        Args:
            phase: what it is.
            value: JSON.

        Raises:
            Lost: rank 0 is gone.
        """
        self._set(f"{phase}/{self.rank}", value)

    def collect(self, phase: str, ranks: Iterable[int], seconds: float) -> dict[int, Any]:
        """Return what these ranks have handed over, without those that have not within the limit; for rank 0.

        Args:
            phase: what it is.
            ranks: from whom.
            seconds: how long to wait for all of them.
        """
        deadline = time.monotonic() + seconds
        awaited, found = set(ranks), {}
        while awaited:
            late = time.monotonic() > deadline
            for rank in sorted(awaited):
                key = f"{self._prefix}/{phase}/{rank}"
                if self.store.check([key]):
                    found[rank] = json.loads(self.store.get(key))
                    awaited.discard(rank)
            if late:
                break
            if awaited:
                time.sleep(_INTERVAL)
        return found

    def tell(self, phase: str, value: Any) -> None:
        """Tell all others something; for rank 0.

        Args:
            phase: what it is.
            value: JSON.
        """
        self._set(phase, value)

    def hear(self, phase: str, seconds: float) -> Any:
        """Return what rank 0 tells all.

        Args:
            phase: what it is.
            seconds: how long to wait for it.

        Raises:
            Lost: it has not come.
        """
        key = f"{self._prefix}/{phase}"
        try:
            self.store.wait([key], timedelta(seconds=seconds))
            return json.loads(self.store.get(key))
        except RuntimeError as error:
            raise Lost(f"{self._me()} has lost rank 0 at {self.address}, waiting for {phase!r}") from error

    def end(self, code: int, present: Iterable[int]) -> None:
        """Tell all others how it ended, and let them go before the store is closed; for rank 0.

        Args:
            code: the exit code.
            present: the ranks that are there.
        """
        self.tell("end", code)
        self.collect("bye", [rank for rank in present if rank != self.rank], _END)

    def leave(self, seconds: float) -> int:
        """Wait for the word of rank 0 that it is over, and for its port to be closed; for any rank but 0.

        The job that is started next may meet at the same port, and must not find this store there.

        Args:
            seconds: how long to wait for the word.

        Returns:
            The exit code.

        Raises:
            Lost: rank 0 is gone.
        """
        code = int(self.hear("end", seconds))
        self.give("bye", True)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            _wait_for_closing(self.address)
        return code

    def _set(self, key: str, value: Any) -> None:
        try:
            self.store.set(f"{self._prefix}/{key}", json.dumps(value))
        except RuntimeError as error:
            raise Lost(f"{self._me()} has lost rank 0 at {self.address}") from error

    def _me(self) -> str:
        return f"rank {self.rank} on {socket.gethostname()}"


def join(point: str | None = None, nodes: int = 1) -> Meeting:
    """Come to the meeting.

    Args:
        point: "HOST:PORT" where no launcher has said which rank this is: the process on HOST is rank 0, and the others
            are numbered as they come. None for what the environment says.
        nodes: how many processes come to the point.

    Raises:
        ValueError: the port is taken, or rank 0 is not reached within the limit.
    """
    limit = rendezvous.meeting_limit()
    count = nodes if point else int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Meeting(dist.HashStore(), 0, 1, "", limit)
    host, port = _split(point or f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}")
    serves = _is_here(host) if point else rendezvous.serves_store()
    if not serves:
        limit = _wait_for_port(host, port, limit)
    store = rendezvous.open_store(host, port, count, serves, limit)
    rank = int(os.environ["RANK"]) if not point else _number(store, serves)
    if rank >= count:
        raise ValueError(f"--nodes {count}, but {rank + 1} processes have come to {point}")
    return Meeting(store, rank, count, f"{host}:{port}", rendezvous.meeting_limit())


def _number(store: dist.Store, serves: bool) -> int:
    return 0 if serves else int(store.add("lift_ds/doctor/comers", 1))


def _split(point: str) -> tuple[str, int]:
    host, _, port = point.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"--meet {point!r} is not HOST:PORT")
    return host, int(port)


def _is_here(host: str) -> bool:
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        raise ValueError(
            f"--meet {host}: {socket.gethostname()} does not resolve the name: {error.strerror}"
        ) from error
    return any(entry.address == address for entries in psutil.net_if_addrs().values() for entry in entries)


def _wait_for_port(host: str, port: int, limit: float) -> float:
    """Wait until something listens where rank 0 is to be; return the seconds that are left of the limit."""
    deadline = time.monotonic() + limit
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection((host, port), max(min(left, 5.0), 0.1)).close()
            return max(left, 1.0)
        except OSError as error:
            if left < 0:
                reason = error.strerror or str(error)
                raise ValueError(
                    f"{rendezvous.this_process()} does not reach rank 0 at {host}:{port} within {limit:g} s: {reason}; "
                    "is it started, and does a firewall let the port through? PORT names another one"
                ) from error
        time.sleep(0.2)


def _wait_for_closing(address: str) -> None:
    host, port = _split(address)
    deadline = time.monotonic() + _END
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host, port), 1.0).close()
        except OSError:
            return
        time.sleep(_INTERVAL)
