"""What the doctor says: one screen, a JSON file, an exit code."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from lift_ds.doctor import links
from lift_ds.doctor.examination import Observed
from lift_ds.doctor.findings import ERROR, WARNING, Finding, ahead_of_middle, some

#: Exit codes, by the worst finding; arguments that cannot be used are 2 too.
HEALTHY, WARNED, FAILED = 0, 1, 2

#: Most findings on the screen; the JSON file has all.
_MOST = 30


def exit_code(findings: Iterable[Finding]) -> int:
    """Return the exit code.

    Args:
        findings: what is wrong.
    """
    severities = {finding.severity for finding in findings}
    return FAILED if ERROR in severities else WARNED if WARNING in severities else HEALTHY


def screen(seen: Observed, findings: list[Finding], plan: str, quick: bool, seconds: float) -> str:
    """Return what is printed.

    Args:
        seen: what was found out.
        findings: what is wrong.
        plan: what the planner says, "" where it was not asked.
        quick: whether this was the quick part, of which only what is wrong is told.
        seconds: that it took.
    """
    lines = [] if quick else list(_summary(seen, plan))
    lines += [str(finding) for finding in findings[:_MOST]]
    if len(findings) > _MOST:
        lines.append(f"and {len(findings) - _MOST} more, which --json FILE lists")
    lines.append(f"lift-ds doctor: {_verdict(findings)} on {_nodes(seen)} ({seconds:.0f} s)")
    return "\n".join(lines)


def record(seen: Observed, findings: list[Finding], plan: str) -> dict[str, Any]:
    """Return what is written as JSON.

    Args:
        seen: what was found out.
        findings: what is wrong.
        plan: what the planner says.
    """
    return {
        "exit_code": exit_code(findings),
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "plan": plan or None,
        **dataclasses.asdict(seen),
    }


def _nodes(seen: Observed) -> str:
    return f"{len(seen.nodes)} node{'' if len(seen.nodes) == 1 else 's'}"


def _verdict(findings: list[Finding]) -> str:
    count = Counter(finding.severity for finding in findings)
    parts = [f"{count[kind]} {kind}{'s' if count[kind] > 1 else ''}" for kind in (ERROR, WARNING) if count[kind]]
    return ", ".join(parts) or "nothing is wrong"


def _summary(seen: Observed, plan: str) -> Iterator[str]:
    facts = list(seen.nodes.values())
    if not facts:
        return
    devices = Counter(device["name"] for one in facts for device in one["devices"])
    what = ", ".join(f"{count} x {name}" for name, count in devices.items()) or "no GPU"
    yield f"nodes       {some(seen.nodes)}; {len(seen.ranks)} of {seen.count} ranks; {what}"
    yield f"versions    {', '.join(f'{name} {version}' for name, version in facts[0]['versions'].items())}"
    yield f"memory      /dev/shm: {_least(one['shm'] for one in facts)} GB free; {_locked(facts)} to lock"
    if len(facts) > 1:
        addresses = (f"{host} {one['address']} ({one['interface']})" for host, one in seen.nodes.items())
        yield f"addresses   {some(addresses)}"
        if seen.contact:
            apart = max(ahead_of_middle(seen).values()) - min(ahead_of_middle(seen).values())
            yield f"clocks      {apart * 1e3:.1f} ms apart"
    yield f"output      {_folder(seen)}"
    yield f"transport   {_transport(seen)}"
    yield from _bandwidth(seen)
    if plan:
        yield f"plan        {plan}"


def _least(values: Iterable[int | None]) -> str:
    return f"{min(value or 0 for value in values) / 1e9:.3g}"


def _locked(facts: list[dict[str, Any]]) -> str:
    limits = [one["locked"] for one in facts if one["locked"] is not None]
    return f"{min(limits) / 1e9:.3g} GB" if limits else "any number of GB"


def _folder(seen: Observed) -> str:
    if seen.output_dir is None:
        return "not looked at; name it by --output-dir"
    known = [contact["folder"]["rate"] for contact in seen.contact.values() if (contact["folder"] or {}).get("rate")]
    return f"{seen.output_dir}" + (f", written at {_range(known)} GB/s" if known else "")


def _transport(seen: Observed) -> str:
    if not seen.transports:
        return ", ".join(sorted({one["backend"] for one in seen.nodes.values()}))
    all_ = [one for of_ranks in seen.transports.values() for one in of_ranks]
    networks = sorted({f"{one['network']} ({', '.join(one['adapters'])})" for one in all_ if one["network"]})
    ways = sorted({way for one in all_ for way in one["ways"]})
    return f"NCCL between nodes by {', '.join(networks) or '(not said)'}; channels by {', '.join(ways) or '(not said)'}"


def _bandwidth(seen: Observed) -> Iterator[str]:
    if seen.unmeasured:
        yield f"bandwidth   not measured: {seen.unmeasured}"
        return
    found = links.rates(seen.links, seen.ranks_of())
    if inside := found.all_inside():
        yield f"bandwidth   between ranks of a node {_range(inside)} GB/s"
    whole = found.between_nodes()
    if whole:
        yield f"bandwidth   between nodes {_range(whole.values())} GB/s"
    if 1 < len(whole) <= 10:
        yield "            " + ", ".join(f"{a} and {b} {rate / 1e9:.3g}" for (a, b), rate in whole.items())


def _range(values: Iterable[float]) -> str:
    ordered = sorted(values)
    low, high = (f"{value / 1e9:.3g}" for value in (ordered[0], ordered[-1]))
    return low if low == high else f"{low} to {high}"
