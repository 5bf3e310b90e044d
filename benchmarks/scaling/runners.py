"""Where a cell runs: processes of this machine, hosts of a hostfile by ssh, a job of SLURM."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from benchmarks.measure.records import Record
from benchmarks.scaling.job import RESULT, Job, failure_of, prepare

#: Seconds beyond a job's limit in which its nodes end their ranks and themselves.
_GRACE = 30.0
_INTERVAL = 0.2

#: The checkout, from which nodes are started, and their program.
_ROOT = Path(__file__).parents[2]
_NODE = (sys.executable, "-m", "benchmarks.scaling.node")

_SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=10")


class CellError(Exception):
    """A cell that did not come to its end; says why in one line."""


class Runner(Protocol):
    """Runs jobs."""

    def check(self, nodes: int, ranks_per_node: int, folder: Path) -> None:
        """Refuse what cannot be run.

        Raises:
            ValueError: names the setting, its value and what would be valid.
        """

    def start(self, job: Job, folder: Path) -> None:
        """Run the nodes of a job that is prepared and wait for their end, for a limited time.

        Raises:
            CellError: a node failed.
        """


def run_job(runner: Runner, job: Job, folder: Path) -> Record:
    """Run one job.

    Args:
        runner: where.
        job: what.
        folder: of the job; made anew.

    Returns:
        What was measured.

    Raises:
        CellError: it failed; no process of it is left.
    """
    prepare(folder, job)
    try:
        runner.start(job, folder)
    except CellError as error:
        raise CellError(failure_of(folder) or str(error)) from error
    if not (folder / RESULT).exists():
        raise CellError(failure_of(folder) or "it ended without a result")
    result: Record = json.loads((folder / RESULT).read_text())
    return result


class Local:
    """Ranks on this machine."""

    def check(self, nodes: int, ranks_per_node: int, folder: Path) -> None:
        if nodes > 1:
            raise ValueError(f"--nodes {nodes}: --launcher local has one node; take hostfile or slurm")

    def start(self, job: Job, folder: Path) -> None:
        _supervise([_node_command(folder, 0, "127.0.0.1")], folder, job.limit)


class Hosts:
    """The first hosts of a hostfile, by ssh; the folder of the study and this environment are on storage they share.

    Args:
        hostfile: lines such as `node1 slots=8`.
    """

    def __init__(self, hostfile: Path) -> None:
        self._path, self._slots = hostfile, read_hostfile(hostfile)

    def check(self, nodes: int, ranks_per_node: int, folder: Path) -> None:
        if nodes > len(self._slots):
            raise ValueError(f"--nodes {nodes}: {self._path} has {len(self._slots)} host(s)")
        hosts = list(self._slots)[:nodes]
        for host in hosts:
            if ranks_per_node > self._slots[host]:
                raise ValueError(f"{ranks_per_node} ranks on {host}: {self._path} has slots={self._slots[host]} there")
        needed = [str(_ROOT / "benchmarks"), sys.executable, str(folder)]
        question = " && ".join(f"test -e {shlex.quote(path)}" for path in needed)
        asked = [(host, subprocess.Popen([*_SSH, host, question], stdin=subprocess.DEVNULL)) for host in hosts]
        for host, process in asked:
            try:
                code = process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                code = 255
            if code:
                why = "does not answer ssh" if code == 255 else f"does not see all of {', '.join(needed)}"
                raise ValueError(f"{self._path}: {host} {why}")

    def start(self, job: Job, folder: Path) -> None:
        hosts = list(self._slots)[: job.cell.nodes]
        commands = []
        for node, host in enumerate(hosts):
            remote = shlex.join(_node_command(folder, node, hosts[0]))
            commands.append([*_SSH, host, f"cd {shlex.quote(str(_ROOT))} && exec {remote}"])
        _supervise(commands, folder, job.limit)


class Slurm:
    """Jobs of SLURM, one a cell.

    Args:
        options: further options of sbatch, such as `--partition=main --gpus-per-node=8`.
        queue_limit: seconds that a job may wait in the queue.
    """

    def __init__(self, options: Sequence[str], queue_limit: float) -> None:
        self._options, self._queue_limit = list(options), queue_limit

    def check(self, nodes: int, ranks_per_node: int, folder: Path) -> None:
        try:
            found = subprocess.run(["sinfo", "--noheader", "--format=%D"], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ValueError(f"--launcher slurm: sinfo cannot be asked for the nodes: {error}") from error
        if found.returncode:
            raise ValueError(f"--launcher slurm: sinfo says {' '.join(found.stderr.split())}")
        most = max((int(count) for count in found.stdout.split()), default=0)
        if nodes > most:
            raise ValueError(f"--nodes {nodes}: SLURM has at most {most} in a partition")

    def start(self, job: Job, folder: Path) -> None:
        script = folder / "job.sbatch"
        script.write_text(batch_script(job, folder))
        number = _ask("sbatch", "--parsable", *self._options, str(script)).split(";")[0]
        try:
            self._wait(number, folder, job.limit)
        finally:
            subprocess.run(["scancel", number], check=False, capture_output=True, timeout=60)

    def _wait(self, number: str, folder: Path, limit: float) -> None:
        deadline = time.monotonic() + self._queue_limit
        running = False
        while state := _ask("squeue", "--noheader", "--format=%T", "--jobs", number, missing="Invalid job id"):
            if state not in ("PENDING", "CONFIGURING") and not running:
                running, deadline = True, time.monotonic() + limit + 2 * _GRACE
            if state == "COMPLETING" and (folder / RESULT).exists():
                return
            if time.monotonic() > deadline:
                raise CellError(f"job {number} was {state} for too long")
            time.sleep(1)


def batch_script(job: Job, folder: Path) -> str:
    """Return the script of a job: a task on each node, which starts that node's ranks."""
    command = shlex.join([*_NODE, str(folder)])
    minutes = int((job.limit + 2 * _GRACE) // 60) + 1
    return f"""#!/bin/bash
#SBATCH --job-name=lift-study
#SBATCH --nodes={job.cell.nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time={minutes}
#SBATCH --output={folder}/slurm.log
#SBATCH --chdir={_ROOT}
set -eu
export HEAD=$SLURMD_NODENAME
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" \\
  bash -c '{command} --node "$SLURM_NODEID" --address "$HEAD"'
"""


def read_hostfile(path: Path) -> dict[str, int]:
    """Read the hosts of a hostfile and how many ranks each takes.

    Raises:
        ValueError: there is no such file, it names no host, or a line is none of a hostfile.
    """
    if not path.is_file():
        raise ValueError(f"--hostfile {path}: there is no such file")
    slots: dict[str, int] = {}
    for line in path.read_text().splitlines():
        if not (text := line.split("#")[0].strip()):
            continue
        found = re.fullmatch(r"(\S+)\s+slots=(\d+)", text)
        if found is None or found[1] in slots:
            raise ValueError(f"--hostfile {path}: {text!r} is not a host's one line such as `node1 slots=8`")
        slots[found[1]] = int(found[2])
    if not slots:
        raise ValueError(f"--hostfile {path} names no host")
    return slots


def _node_command(folder: Path, node: int, address: str) -> list[str]:
    return [*_NODE, str(folder), "--node", str(node), "--address", address, "--watch_stdin"]


def _supervise(commands: Sequence[Sequence[str]], folder: Path, limit: float) -> None:
    """Run one command for each node until all are done; when one fails, the others lose their standard input.

    Raises:
        CellError: one failed, or the limit passed.
    """
    deadline = time.monotonic() + limit + _GRACE
    logs = [folder / f"node{number}.log" for number in range(len(commands))]
    nodes = [_start(command, log) for command, log in zip(commands, logs, strict=True)]
    try:
        while None in (codes := [node.poll() for node in nodes]) and not any(codes):
            if time.monotonic() > deadline:
                raise CellError(f"the nodes were not done within {limit:g} s")
            time.sleep(_INTERVAL)
    finally:
        for node in nodes:
            assert node.stdin is not None
            node.stdin.close()
        for node in nodes:
            _wait_for(node)
    for number, code in enumerate(codes):
        if code:
            said = " ".join(logs[number].read_text(errors="replace").split())[-500:]
            raise CellError(f"node {number} ended with {code}: {said}")


def _start(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=output, stderr=output)


def _wait_for(node: subprocess.Popen[bytes]) -> None:
    """Wait for a node that has lost its standard input."""
    try:
        node.wait(_GRACE)
    except subprocess.TimeoutExpired:
        node.kill()
        node.wait()


def _ask(*command: str, missing: str | None = None) -> str:
    """Return what a command of SLURM says; nothing where it says that the job is not known (any more)."""
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if found.returncode:
        if missing is not None and missing in found.stderr:
            return ""
        raise CellError(f"{command[0]} ended with {found.returncode}: {' '.join(found.stderr.split())}")
    return found.stdout.strip()
