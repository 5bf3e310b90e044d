"""What is done in which order. Rank 0 waits for the others at each step, within limits, and goes on with who is there.

all        come, say what their node is like             -> "facts"
rank 0     says who is there                             -> "roster"
one a node visits the others, looks at the output folder -> "contact"
rank 0     says whether there is more to do              -> "measure"
all        measure links, where asked for                -> "links"
rank 0     says how it ends                              -> "end"
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lift_ds.doctor import contact, folder, node
from lift_ds.doctor.limits import within
from lift_ds.doctor.meeting import Meeting

#: Seconds that a process may take to look at its node and at the others, beside the limit of the meeting.
_CONTACT = 120.0

#: Exit code of the other ranks where rank 0 could not tell one: an argument cannot be used.
_UNJUDGED = 2


@dataclass(frozen=True)
class Settings:
    """What to examine.

    Args:
        quick: leaves out what takes more than seconds: bandwidth, transport, the speed of the folder.
        output_dir: the folder that all nodes are to share; None to leave it out.
        hosts: names of the nodes in the order of their ranks, to name those that never come; () where unknown.
    """

    quick: bool = False
    output_dir: Path | None = None
    hosts: tuple[str, ...] = ()


@dataclass
class Observed:
    """What was found out of a cluster.

    Args:
        count: of the processes that were to come.
        address: where they were to meet, "HOST:PORT"; "" for one process.
        limit: seconds within which they were to come.
        expected: names of the hosts in the order of their ranks, () where unknown.
        ranks: of who has come -> "host", "local_rank".
        nodes: host -> its facts, as of `node.examine_node`.
        contact: host -> "met": as of `contact.visit`; "folder": as of `folder.look`, None where not asked for.
        mark: as of `folder.leave_mark`, None where not asked for.
        output_dir: the folder, None where not asked for.
        links: as of `bandwidth.measure`, of all ranks.
        transports: host -> as of `transport.read`, of each of its ranks.
        unmeasured: why links were not measured, "" where they were.
        failed: rank -> the error that it met while it measured.
    """

    count: int
    address: str = ""
    limit: float = 0.0
    expected: tuple[str, ...] = ()
    ranks: dict[int, dict[str, Any]] = field(default_factory=dict)
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    contact: dict[str, dict[str, Any]] = field(default_factory=dict)
    mark: dict[str, Any] | None = None
    output_dir: str | None = None
    links: list[dict[str, Any]] = field(default_factory=list)
    transports: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    unmeasured: str = ""
    failed: dict[int, str] = field(default_factory=dict)

    def absent(self) -> list[int]:
        """Return the ranks that have not come."""
        return [rank for rank in range(self.count) if rank not in self.ranks]

    def ranks_of(self) -> dict[str, list[int]]:
        """Return host -> its ranks."""
        found: dict[str, list[int]] = {}
        for rank in sorted(self.ranks):
            found.setdefault(self.ranks[rank]["host"], []).append(rank)
        return found


def examine(meeting: Meeting, settings: Settings, judge: Callable[[Observed], int]) -> int:
    """Find out what there is to find out; all processes call.

    Args:
        meeting: of the processes.
        settings: what to examine, the same for all.
        judge: for rank 0: turns what was found into an exit code.

    Returns:
        The exit code, the same for all.

    Raises:
        Lost: rank 0 is gone, for the others.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    port = contact.listen() if meeting.count > 1 else 0
    mark = None
    if meeting.rank == 0 and settings.output_dir is not None:
        mark = folder.leave_mark(settings.output_dir)
    try:
        meeting.give("facts", {**_introduce(meeting, local_rank), "port": port})
        if meeting.rank == 0:
            return _lead(meeting, settings, judge, mark)
        return _follow(meeting, settings)
    finally:
        if mark is not None and settings.output_dir is not None:
            folder.remove(settings.output_dir, mark)


def _introduce(meeting: Meeting, local_rank: int) -> dict[str, Any]:
    who = {"host": socket.gethostname(), "local_rank": local_rank}
    if local_rank == 0:
        who["node"] = node.examine_node(one_machine=meeting.count == 1)
    return who


def _lead(meeting: Meeting, settings: Settings, judge: Callable[[Observed], int], mark: dict[str, Any] | None) -> int:
    facts = meeting.collect("facts", range(meeting.count), meeting.limit)
    seen = Observed(meeting.count, meeting.address, meeting.limit, settings.hosts, mark=mark)
    seen.output_dir = str(settings.output_dir) if settings.output_dir else None
    seen.ranks = {rank: {name: fact[name] for name in ("host", "local_rank")} for rank, fact in facts.items()}
    leaders: dict[str, int] = {}
    for rank, fact in sorted(facts.items()):
        if "node" in fact and fact["host"] not in leaders:
            leaders[fact["host"]] = rank
            seen.nodes[fact["host"]] = fact["node"]
    doors = {
        host: {"address": seen.nodes[host]["address"], "port": facts[rank]["port"]} for host, rank in leaders.items()
    }
    nodes = list(seen.ranks_of().values())
    roster = {"leaders": leaders, "doors": doors, "mark": (mark or {}).get("mark"), "nodes": nodes}
    meeting.tell("roster", roster)
    _contact(meeting, settings, roster)
    met = meeting.collect("contact", leaders.values(), _CONTACT)
    seen.contact = {host: met[rank] for host, rank in leaders.items() if rank in met}
    seen.unmeasured = _why_not_measure(seen, settings)
    meeting.tell("measure", not seen.unmeasured)
    if not seen.unmeasured:
        _measure(meeting, nodes)
        _gather_links(meeting, seen, nodes)
    code = _UNJUDGED
    try:
        code = judge(seen)
    finally:
        meeting.end(code, seen.ranks)
    return code


def _follow(meeting: Meeting, settings: Settings) -> int:
    roster = meeting.hear("roster", meeting.limit + _CONTACT)
    _contact(meeting, settings, roster)
    wait = 2 * _CONTACT
    if meeting.hear("measure", wait):
        wait += _measure(meeting, roster["nodes"])
    return meeting.leave(wait)


def _contact(meeting: Meeting, settings: Settings, roster: dict[str, Any]) -> None:
    """Visit the others and look at the folder, where this process is the one of its node that does."""
    host = socket.gethostname()
    if roster["leaders"].get(host) != meeting.rank:
        return
    met = contact.visit({other: door for other, door in roster["doors"].items() if other != host})
    looked = None
    if settings.output_dir is not None and roster["mark"] is not None:
        looked = folder.look(settings.output_dir, roster["mark"], timed=not settings.quick)
    meeting.give("contact", {"met": met, "folder": looked})


def _why_not_measure(seen: Observed, settings: Settings) -> str:
    if settings.quick:
        return "--quick"
    if seen.count == 1:
        return "one process has no other to send to"
    if seen.absent():
        return "not all ranks have come"
    if any("error" in met for host in seen.contact.values() for met in host["met"].values()):
        return "not all nodes reach each other"
    if any(seen.nodes[host]["address"].startswith("127.") for host in seen.nodes) and len(seen.nodes) > 1:
        return "a node has no address by which others reach it"
    return ""


def _measure(meeting: Meeting, nodes: list[list[int]]) -> float:
    """Measure links and hand over what was found, or why not; returns the seconds that this may take."""
    from lift_ds.doctor import bandwidth

    limit = bandwidth.time_limit(nodes)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    try:
        found = within(
            limit, lambda: bandwidth.measure(meeting.store, meeting.rank, local_rank, nodes), "measuring the links"
        )
    except Exception as error:  # whatever a backend raises; it becomes a finding
        found = {"error": (str(error) or type(error).__name__).strip().splitlines()[0]}
    meeting.give("links", found)
    return limit


def _gather_links(meeting: Meeting, seen: Observed, nodes: list[list[int]]) -> None:
    from lift_ds.doctor import bandwidth

    given = meeting.collect("links", seen.ranks, bandwidth.time_limit(nodes))
    for rank, who in seen.ranks.items():
        found = given.get(rank, {"error": "it has not said what it measured"})
        if "error" in found:
            seen.failed[rank] = found["error"]
            continue
        seen.links += found["links"]
        if found["transport"]:
            seen.transports.setdefault(who["host"], []).append(found["transport"])
