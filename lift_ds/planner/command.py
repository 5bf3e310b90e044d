"""The command `lift-ds plan`: its options, and what it prints and writes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from lift_ds.config import USUAL_DENSITY, LiftConfig
from lift_ds.planner import ds_file, plot, report
from lift_ds.planner.estimate import METHODS, Cluster
from lift_ds.planner.hardware import DEVICES, Hardware, device_for
from lift_ds.planner.models import read_facts
from lift_ds.planner.plan import STAGES, Plan, Request, make_plan
from lift_ds.planner.presets import PRESETS
from lift_ds.runtime.numbers import amount, count

#: Options that replace a figure of the device: option -> (field of Hardware, help).
_FIGURES = {
    "--gpu-memory": ("memory_gb", "memory of a GPU, GB (10^9 bytes)"),
    "--tflops": ("tflops", "products of a GPU in bf16, TFLOPS"),
    "--fp32-tflops": ("fp32_tflops", "the same in fp32, in which refreshes are computed"),
    "--bandwidth": ("bandwidth_gb", "of a GPU's memory, GB/s"),
    "--efficiency": ("efficiency", "share of the TFLOPS that training reaches"),
    "--intra-node": ("intra_gb", "a GPU to the others of its node, one direction, GB/s"),
    "--inter-node": ("inter_gb", "a node to the others, one direction, GB/s"),
    "--reserve": ("reserve_gb", "memory of a GPU not to plan with, GB"),
}


def main(arguments: list[str]) -> int:
    """Run the command.

    Args:
        arguments: what follows `lift-ds plan`.

    Returns:
        The exit code: 0, 2 for what cannot be used.
    """
    args = _parser().parse_args(arguments)
    try:
        found = _plan(args)
        print(report.table(found))
        _write(found, args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    plan = argparse.ArgumentParser(
        prog="lift-ds plan",
        description="Compares full fine-tuning, LoRA and LIFT on each ZeRO stage; allocates and downloads nothing.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    plan.add_argument("--model", required=True, help=f"{', '.join(PRESETS)}, or a folder with a config.json")
    cluster = plan.add_argument_group("cluster")
    cluster.add_argument("--nodes", type=count, default=1)
    cluster.add_argument("--gpus-per-node", type=count, default=8)
    cluster.add_argument("--device", choices=tuple(DEVICES), help="whose speeds to take; by --gpu-memory if left out")
    for option, (_, text) in _FIGURES.items():
        cluster.add_argument(option, type=amount, help=f"{text}; that of the device if left out", metavar="NUMBER")
    cluster.add_argument("--host-memory", type=amount, default=1000.0, help="memory of a node's host, GB")
    cluster.add_argument("--no-overlap", action="store_true", help="no collective runs beside computation")
    run = plan.add_argument_group("run")
    run.add_argument("--batch-size", type=count, default=16, help="sequences of an optimizer step, all ranks together")
    run.add_argument("--sequence", type=count, default=2048, help="tokens of a sequence")
    run.add_argument("--micro-batch", type=count, help="sequences of a forward; the fastest that fits if left out")
    run.add_argument("--checkpointing", choices=("auto", "on", "off"), default="auto", help="of activations")
    run.add_argument("--no-offload", action="store_true", help="leave out choices with the optimizer on the host")
    run.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    run.add_argument("--stages", nargs="+", type=int, choices=STAGES, default=STAGES)
    lift = plan.add_argument_group("LIFT")
    lift.add_argument("--deepspeed", help='a DeepSpeed file, for the settings of its "lift" block')
    lift.add_argument("--budget-rank", type=count, help="in place of --density")
    lift.add_argument("--density", type=float, help=f"{USUAL_DENSITY:g} if neither is given")
    lift.add_argument("--lra-rank", type=count)
    lift.add_argument("--refresh-interval", type=count)
    output = plan.add_argument_group("output")
    output.add_argument("--json", type=Path, help="write everything there")
    output.add_argument("--plot", type=Path, help="draw the memory there (.svg, .png, .pdf)")
    output.add_argument("--write", type=Path, help="write the DeepSpeed file of the recommended choice there")
    return plan


def _plan(args: argparse.Namespace) -> Plan:
    config = _lift_config(args)
    facts = read_facts(args.model, config)
    cluster = Cluster(args.nodes, args.gpus_per_node, _hardware(args), args.host_memory)
    request = Request(
        batch=args.batch_size,
        sequence=args.sequence,
        methods=tuple(args.methods),
        stages=tuple(args.stages),
        micro_batch=args.micro_batch,
        checkpointing=None if args.checkpointing == "auto" else args.checkpointing == "on",
        offload=not args.no_offload,
    )
    return make_plan(facts, config, cluster, request)


def _lift_config(args: argparse.Namespace) -> LiftConfig:
    if args.budget_rank is not None and args.density is not None:
        raise ValueError(f"--budget-rank {args.budget_rank} and --density {args.density} are both given; give one")
    config = LiftConfig.from_ds_config(args.deepspeed) if args.deepspeed else LiftConfig(density=USUAL_DENSITY)
    if args.budget_rank is not None:
        config = dataclasses.replace(config, budget_rank=args.budget_rank, density=None)
    if args.density is not None:
        config = dataclasses.replace(config, budget_rank=None, density=args.density)
    given = {"lra_rank": args.lra_rank, "refresh_interval": args.refresh_interval}
    return dataclasses.replace(config, **{name: value for name, value in given.items() if value is not None})


def _hardware(args: argparse.Namespace) -> Hardware:
    base = DEVICES[args.device] if args.device else device_for(args.gpu_memory or 80.0)
    given = {}
    for option, (field, _) in _FIGURES.items():
        value = getattr(args, option[2:].replace("-", "_"))
        if value is not None:
            given[field] = value
    found = dataclasses.replace(base, overlap=not args.no_overlap, **given)
    if found.efficiency > 1:
        raise ValueError(f"--efficiency {found.efficiency:g} is no share in (0, 1]")
    if found.reserve_gb >= found.memory_gb:
        raise ValueError(f"--reserve {found.reserve_gb:g} leaves nothing of --gpu-memory {found.memory_gb:g}")
    return found


def _write(found: Plan, args: argparse.Namespace) -> None:
    if args.json:
        try:
            args.json.write_text(json.dumps(report.record(found), indent=1) + "\n")
        except OSError as error:
            raise ValueError(f"--json {args.json}: cannot be written: {error.strerror}") from error
    if args.plot:
        plot.draw(found, args.plot)
    if args.write:
        if found.recommended is None:
            raise ValueError(f"--write {args.write}: nothing fits, so there is no configuration to write")
        ds_file.write_ds_file(args.write, ds_file.ds_file(found, found.recommended.choice))
