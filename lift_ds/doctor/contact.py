"""Whether the nodes reach each other: every node listens at a port of its own, and every other one comes to it."""

from __future__ import annotations

import json
import socket
import socketserver
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lift_ds.doctor.limits import within

#: Seconds for a connection, and for a name to be resolved.
_CONNECTION, _NAME = 5.0, 10.0

#: Questions for the time of another node; the one with the quickest answer counts.
_QUESTIONS = 5


class _Answer(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        self.connection.settimeout(_CONNECTION)
        host = socket.gethostname()
        try:
            while self.rfile.read(1):
                self.wfile.write(json.dumps({"host": host, "time": time.time()}).encode() + b"\n")
        except OSError:
            pass


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 1024


def listen() -> int:
    """Answer whoever comes until this process ends; returns the port, at any address of this node."""
    server = _Server(("", 0), _Answer)
    threading.Thread(target=server.serve_forever, name="doctor's port", daemon=True).start()
    return int(server.server_address[1])


def visit(others: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Go to every other node, and resolve its name.

    Args:
        others: name of a host -> its "address" and the "port" it listens at.

    Returns:
        For each: what its name resolves to ("resolved", "" for nothing); "ahead", the seconds that its clock is ahead
        of this one's, and "within", how exactly that is known; or "error", why it is not reached.
    """
    if not others:
        return {}
    with ThreadPoolExecutor(min(128, len(others))) as pool:
        met = pool.map(lambda item: _visit_one(*item), others.items())
        return dict(zip(others, met, strict=True))


def _visit_one(host: str, where: dict[str, Any]) -> dict[str, Any]:
    try:
        resolved = within(_NAME, lambda: socket.gethostbyname(host), f"resolving {host}")
    except OSError:
        resolved = ""
    try:
        return {"resolved": resolved, **ask_time(host, where["address"], where["port"])}
    except (OSError, ValueError) as error:
        return {"resolved": resolved, "error": str(getattr(error, "strerror", None) or error)}


def ask_time(host: str, address: str, port: int) -> dict[str, float]:
    """Ask a node for its time.

    Args:
        host: who has to answer.
        address: where.
        port: the same.

    Returns:
        "ahead", "within": see `visit`.

    Raises:
        OSError: it is not reached.
        ValueError: something else answers.
    """
    best = {"ahead": 0.0, "within": float("inf")}
    with socket.create_connection((address, port), _CONNECTION) as connection, connection.makefile("rb") as answers:
        for _ in range(_QUESTIONS):
            asked = time.time()
            connection.sendall(b"?")
            line = answers.readline()
            heard = time.time()
            if not line:
                raise ConnectionError("the connection was closed")
            answer = json.loads(line)
            if answer["host"] != host:
                raise ValueError(f"{answer['host']} answers in its place")
            if heard - asked < 2 * best["within"]:
                best = {"ahead": answer["time"] - (asked + heard) / 2, "within": (heard - asked) / 2}
    return best
