"""A plan as text for a terminal, and as JSON."""

from __future__ import annotations

from typing import Any

from lift_ds.planner.estimate import Estimate, as_json
from lift_ds.planner.formulas import GRADIENTS, INDEX, MASTER, MOMENTS, TRAINED, UNMANAGED, WEIGHTS
from lift_ds.planner.plan import Plan

_GB = 1e9


def table(plan: Plan) -> str:
    """Return the comparison: a row for each method and stage, gigabytes (10^9 bytes) and seconds on one rank."""
    head = (
        f"{'':18}{'micro':>6}{'accum':>6}{'ckpt':>5} |{'weights':>8}{'trained':>8}{'index':>6}{'grads':>8}"
        f"{'Adam':>7} |{'peak':>7}  {'fits':11}|{'step s':>7}{'tok/s':>8}{'net GB':>7}{'refresh s':>10}"
    )
    lines = [*_summary(plan), "", head, "-" * len(head)]
    for row in plan.rows:
        lines.append(_row(plan, row) + ("  <- recommended" if row is plan.recommended else ""))
    return "\n".join([*lines, "", *_legend(plan), *_remarks(plan), "", *_advice(plan)])


def _summary(plan: Plan) -> list[str]:
    facts, cluster, hardware = plan.facts, plan.cluster, plan.cluster.hardware
    trained = sum(facts.entries.values())
    return [
        f"{facts.name}: {facts.parameters:,} parameters; LIFT manages {sum(facts.matrices.values())} matrices, trains "
        f"{trained:,} of their {facts.managed:,} entries ({trained / facts.managed:.2%})"
        + (f"; {facts.dense_parameters:,} more parameters trained densely" if facts.dense else ""),
        f"{cluster.nodes} x {cluster.gpus_per_node} {hardware.name}: {hardware.memory_gb:g} GB, "
        f"{hardware.reserve_gb:g} of them kept free; {hardware.tflops:g} TFLOPS at {hardware.efficiency:.0%}; links "
        f"{hardware.intra_gb:g} GB/s in a node"
        + (f", {hardware.inter_gb:g} GB/s between nodes" if cluster.nodes > 1 else ""),
        f"batch {plan.batch} x {plan.request.sequence} tokens"
        + ("" if plan.batch == plan.request.batch else f" (raised from {plan.request.batch}: one sequence a rank)"),
    ]


def _row(plan: Plan, row: Estimate) -> str:
    choice, held = row.choice, {key: size / _GB for key, size in row.persistent.items()}
    name = f"{choice.method} ZeRO-{choice.stage}" + " node" * bool(choice.copy_ranks) + " +host" * choice.offload
    fits = "yes" if row.fits else f"no: -{row.missing / _GB:.1f}"
    tokens = plan.batch * choice.sequence / row.time.total / plan.cluster.ranks
    refresh = f"{row.time.refresh:10.2f}" if row.refresh else f"{'':10}"
    return (
        f"{name:18}{choice.micro_batch:6}{choice.accumulation:6}{'yes' if choice.checkpointing else 'no':>5} |"
        f"{held[WEIGHTS] + held[UNMANAGED]:8.2f}{held[TRAINED]:8.2f}{held[INDEX]:6.2f}{held[GRADIENTS]:8.2f}"
        f"{held[MASTER] + held[MOMENTS]:7.2f} |{row.peak / _GB:7.1f}  {fits:11}|"
        f"{row.time.total:7.2f}{tokens:8.0f}{row.received / _GB:7.2f}{refresh}"
    )


def _legend(plan: Plan) -> list[str]:
    return [
        "GB = 10^9 bytes on one GPU: held between steps (grads: between backward and step), and at the peak of a step.",
        "micro: sequences of a forward; accum: forwards of a step; ckpt: activation checkpointing; tok/s: per GPU;",
        "node: each node has a copy of the frozen weights.\n" * (plan.cluster.nodes > 1)
        + f"net GB: received per GPU and step; refresh s: of one refresh, every {plan.config.refresh_interval} steps;",
        "step s has its share of that. Memory and bytes are checked against real runs; times rest on the speeds above.",
    ]


def _remarks(plan: Plan) -> list[str]:
    """Say what is assumed about this model in particular, a line each."""
    facts = plan.facts
    lines = []
    if facts.differences:
        lines.append(
            "Activations (in the peak) and times are estimated as of a decoder of the Llama family; this model has: "
            + "; ".join(facts.differences)
            + "."
        )
    if facts.left_out:
        lines.append(f"Its text_config leaves to the defaults of transformers: {', '.join(facts.left_out)}.")
    return lines


def _advice(plan: Plan) -> list[str]:
    row = plan.recommended
    if row is None:
        least = min(plan.rows, key=lambda row: row.missing)
        return [
            f"nothing fits: {least.choice.method} with ZeRO-{least.choice.stage} misses least, by "
            f"{least.missing / _GB:.1f} GB a GPU; take more GPUs, a smaller --micro-batch or --sequence"
        ]
    moment = max(row.moments, key=lambda name: row.moments[name])
    choice = row.choice
    lines = [
        f"recommended: {choice.method}, ZeRO-{choice.stage}{', optimizer on the host' * choice.offload}, micro-batch "
        f"{choice.micro_batch}, {'with' if choice.checkpointing else 'without'} activation checkpointing"
        + ', "frozen_weights": "node"'
        * bool(choice.copy_ranks),
        f"  peak {row.peak / _GB:.1f} of {row.limit / _GB:.1f} GB ({moment}); "
        + ", ".join(f"{name} {size / _GB:.2f}" for name, size in _parts(row).items()),
    ]
    if plan.cluster.nodes > 1:
        lines.append(
            f"  network {row.received / _GB:.2f} GB a GPU and step, {row.between_nodes / _GB:.2f} of it in collectives "
            "that span nodes"
        )
    if row.host:
        lines.append(
            f"  on the host {row.host * plan.cluster.gpus_per_node / _GB:.0f} of {plan.cluster.host_gb:g} GB a node"
        )
    if row.refresh is not None:
        work = row.refresh
        parts = f" in {len(work.parts)} parts" if len(work.parts) > 1 else ""
        lines.append(
            f"  a refresh{parts}: {min(work.matrices)} to {max(work.matrices)} matrices a rank, the busiest "
            f"{work.imbalance - 1:.1%} above the mean; {work.memory / _GB:.2f} GB; "
            f"{sum(row.refresh_network.values()) / _GB:.1f} GB through the network in all"
        )
    return lines


def _parts(row: Estimate) -> dict[str, float]:
    moment = max(row.moments, key=lambda name: row.moments[name])
    held = {name: size for name, size in row.persistent.items() if size and name != GRADIENTS}
    counted = sum(size for name, size in row.persistent.items() if name != GRADIENTS)
    return held | {"activations, gradients and workspace": row.moments[moment] - counted}


def record(plan: Plan) -> dict[str, Any]:
    """Return a plan as JSON values: bytes, seconds, operations."""
    facts, cluster, hardware = plan.facts, plan.cluster, plan.cluster.hardware
    return {
        "model": {
            "name": facts.name,
            "parameters": facts.parameters,
            "managed_parameters": facts.managed,
            "trained_entries": sum(facts.entries.values()),
            "matrices": sum(facts.matrices.values()),
            "differs_from_llama": list(facts.differences),
            "left_to_defaults": list(facts.left_out),
        },
        "cluster": {"nodes": cluster.nodes, "gpus_per_node": cluster.gpus_per_node, "host_gb": cluster.host_gb}
        | {f"gpu_{name}": value for name, value in vars(hardware).items()},
        "batch": plan.batch,
        "lift": plan.config.to_dict(),
        "choices": [as_json(row) for row in plan.rows],
        "recommended": None if plan.recommended is None else plan.rows.index(plan.recommended),
    }
