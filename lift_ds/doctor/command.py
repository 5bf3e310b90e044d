"""The command `lift-ds doctor`: its options, the processes it starts where no launcher has, and how it ends."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lift_ds.doctor import devices
from lift_ds.planner.presets import PRESETS
from lift_ds.runtime.numbers import amount, count
from lift_ds.runtime.ports import free_port

#: Seconds that the processes of one machine may take in all.
_LOCAL = 600.0


def main(arguments: Sequence[str]) -> NoReturn:
    """Examine the cluster as one of its processes, and end this process with the exit code.

    Args:
        arguments: what follows `lift-ds doctor`.
    """
    from lift_ds.training import endings

    args = make_parser().parse_args(arguments)
    try:
        code = _examine(args, list(arguments))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = endings.REFUSED
    except Exception:
        traceback.print_exc()
        code = endings.REFUSED  # 1 says that there are warnings
    endings.end(code)


def make_parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    parser = argparse.ArgumentParser(
        prog="lift-ds doctor",
        description="Checks the nodes of a job before a model loads, as all ranks of any launcher or alone on one "
        "machine. Exit code: 0 nothing is wrong, 1 warnings, 2 errors.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--quick", action="store_true", help="leave out bandwidth, transport and the speed of the folder"
    )
    parser.add_argument("--output-dir", type=Path, help="the folder that all nodes are to share; not looked at without")
    parser.add_argument("--model", help=f"compare the memory with its plan: {', '.join(PRESETS)}, or a folder")
    parser.add_argument("--json", type=Path, help="write everything there")
    floors = parser.add_argument_group("least speeds, GB/s (10^9 bytes); of GPUs half of what lift-ds plan assumes")
    floors.add_argument("--min-intra-node", type=amount, help="of a link within a node", metavar="NUMBER")
    floors.add_argument("--min-inter-node", type=amount, help="of a pair of nodes, all their devices", metavar="NUMBER")
    floors.add_argument("--min-write", type=amount, default=0.05, help="of the folder (0.05)", metavar="NUMBER")
    start = parser.add_argument_group("processes")
    start.add_argument("--processes", type=count, help="on this machine, without a launcher (one a GPU, else one)")
    start.add_argument(
        "--hosts", help="names of the nodes in the order of their ranks, with commas: names who is absent"
    )
    start.add_argument("--meet", help="HOST:PORT where --nodes processes meet that no launcher has given a rank")
    start.add_argument("--nodes", type=count, default=1, help="how many come to --meet (1)")
    start.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    return parser


def _examine(args: argparse.Namespace, arguments: list[str]) -> int:
    from lift_ds.training import launcher

    if args.meet is None:
        launcher.find_ranks()
        if "RANK" not in os.environ and (processes := _local_count(args)) > 1:
            return _start_here(processes, arguments)
    return _take_part(args)


def _local_count(args: argparse.Namespace) -> int:
    if args.quick:
        return 1
    try:
        return args.processes or max(1, len(devices.devices()))
    except OSError:  # examined, and told, by the one process
        return 1


def _start_here(processes: int, arguments: list[str]) -> int:
    """Start the processes of this machine, and return the exit code of the first."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "lift_ds.doctor", *arguments],
            env={
                **os.environ,
                **meeting,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(processes),
            },
        )
        for rank in range(processes)
    ]
    deadline = time.monotonic() + _LOCAL
    try:
        codes = [process.wait(max(deadline - time.monotonic(), 0.1)) for process in started]
    except subprocess.TimeoutExpired:
        raise ValueError(f"the {processes} processes have not ended within {_LOCAL:g} s") from None
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
    return codes[0] if codes[0] >= 0 else 2


def _take_part(args: argparse.Namespace) -> int:
    from lift_ds.doctor import examination, findings, planned, report
    from lift_ds.doctor.meeting import Lost, join

    began = time.monotonic()

    def judge(seen: examination.Observed) -> int:
        limits = planned.link_limits(seen, args.min_intra_node, args.min_inter_node, args.min_write)
        found = findings.find(seen, limits)
        plan = ""
        if args.model:
            plan, unfit = planned.memory(seen, args.model)
            found = sorted([*found, *unfit], key=lambda one: one.severity != findings.ERROR)
        print(report.screen(seen, found, plan, args.quick, time.monotonic() - began), flush=True)
        if args.json:
            _write(args.json, json.dumps(report.record(seen, found, plan), indent=1) + "\n")
        return report.exit_code(found)

    hosts = tuple(args.hosts.split(",")) if args.hosts else ()
    settings = examination.Settings(args.quick, args.output_dir, hosts)
    try:
        return examination.examine(join(args.meet, args.nodes), settings, judge)
    except Lost as error:
        raise ValueError(str(error)) from error


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise ValueError(f"--json {path}: cannot be written: {error.strerror}") from error
