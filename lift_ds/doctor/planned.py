"""What the planner assumes of the links, and what it says of the memory that a model takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from lift_ds.doctor.examination import Observed
from lift_ds.doctor.findings import ERROR, Finding, Limits
from lift_ds.planner.hardware import DEVICES, Hardware, device_for

#: Share of the planner's figures that has to be reached: they are from data sheets, which messages do not reach whole.
SHARE = 0.5


def link_limits(seen: Observed, inside: float | None, across: float | None, write: float) -> Limits:
    """Return what is asked of the links: what the user gave, else of GPUs a share of what plans assume.

    Args:
        seen: what was found out.
        inside: of a link within a node as given, GB/s; None where not given.
        across: of a pair of nodes as given, GB/s; None where not given.
        write: of the output folder, GB/s.
    """
    hardware, planned = hardware_of(seen), ""
    if hardware is not None and (inside is None or across is None):
        inside = SHARE * hardware.intra_gb if inside is None else inside
        across = SHARE * hardware.inter_gb if across is None else across
        planned = f"{SHARE:g} of what lift-ds plan assumes of {hardware.name}"
    return Limits(
        inside=None if inside is None else 1e9 * inside,
        across=None if across is None else 1e9 * across,
        write=1e9 * write,
        planned=planned,
    )


def hardware_of(seen: Observed) -> Hardware | None:
    """Return what the planner knows of the devices, None where it does not know them or there are none.

    Args:
        seen: what was found out.
    """
    names = [device["name"] for facts in seen.nodes.values() for device in facts["devices"]]
    return next((known for key, known in DEVICES.items() if names and key.upper() in names[0].upper()), None)


def smallest_memory(seen: Observed) -> int | None:
    """Return the bytes of the device with least memory, None where there is no device."""
    known = [device["total"] for facts in seen.nodes.values() for device in facts["devices"] if device["total"]]
    return min(known, default=None)


def memory(seen: Observed, model: str) -> tuple[str, list[Finding]]:
    """Compare the free memory of each device with the recommended plan for a model.

    Args:
        seen: what was found out.
        model: a named size, or a folder with a config.json.

    Returns:
        What the plan is, in a line; what does not fit it.

    Raises:
        ValueError: there is no such model.
    """
    from lift_ds.config import USUAL_DENSITY, LiftConfig
    from lift_ds.planner.estimate import Cluster
    from lift_ds.planner.models import read_facts
    from lift_ds.planner.plan import Request, make_plan

    smallest = smallest_memory(seen)
    if smallest is None:
        return f"{model}: no device whose memory could be compared", []
    config = LiftConfig(density=USUAL_DENSITY)
    ranks = max(1, *(len(facts["devices"]) for facts in seen.nodes.values()))
    # Its memory as it is; of an unknown device the planner takes the speeds of one that has as much.
    hardware = dataclasses.replace(hardware_of(seen) or device_for(smallest / 2**30), memory_gb=smallest / 1e9)
    cluster = Cluster(len(seen.nodes), ranks, hardware, 1000.0)
    plan = make_plan(read_facts(model, config), config, cluster, Request(batch=16, sequence=2048, methods=("lift",)))
    if plan.recommended is None:
        text = f"{model} does not fit on {len(seen.nodes)} x {ranks} devices of {smallest / 1e9:.0f} GB by any plan"
        advice = "take more nodes, or larger devices: lift-ds plan compares them"
        return text, [Finding(ERROR, "memory", "all nodes", text, advice)]
    peak = plan.recommended.peak
    said = f"{model}: {peak / 1e9:.1f} GB a device, LIFT by ZeRO-{plan.recommended.choice.stage}"
    return said, list(_without_room(seen, peak, model))


def _without_room(seen: Observed, peak: float, model: str) -> Iterator[Finding]:
    for host, facts in seen.nodes.items():
        for device in facts["devices"]:
            if device["total"] is None or device["used"] is None:
                continue
            free = device["total"] - device["used"]
            if free < peak:
                text = (
                    f"device {device['index']} has {free / 1e9:.1f} GB free, and {model} takes {peak / 1e9:.1f} by plan"
                )
                advice = "free it (nvidia-smi names what runs there), or plan for less: lift-ds plan --gpu-memory"
                yield Finding(ERROR, "memory", host, text, advice)
