"""Hosts made of namespaces, and what is started on them as a user would, within bounds."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

REPOSITORY = Path(__file__).parents[2]
HOSTS = Path(__file__).parent / "hosts.sh"
BIN = Path(sys.executable).parent

#: What hosts and launchers need; tests/cluster/install.sh brings them on Debian.
PROGRAMS = (
    "ip",
    "tc",
    "unshare",
    "nsenter",
    "sshd",
    "ssh",
    "pdsh",
    "mpirun",
    "sbatch",
    "slurmctld",
    "slurmd",
    "munged",
)

#: Longest time of one job. It takes 15 to 30 seconds on two idle cores; the rest is for cores that are shared.
LIMIT_SECONDS = 180.0

#: Seconds for the processes of a job to be gone after its end.
_GONE_SECONDS = 45.0


def why_not() -> str | None:
    """Say why there can be no hosts here, or None."""
    if sys.platform != "linux":
        return "hosts are made of Linux namespaces"
    if os.geteuid() != 0:
        return "making namespaces takes root"
    searched = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    missing = [program for program in PROGRAMS if shutil.which(program, path=searched) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    made = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--ipc", "--pid", "--fork", "--mount-proc", "true"],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode != 0:
        return f"namespaces cannot be made here: {made.stderr.strip()}"
    found = subprocess.run([sys.executable, "-c", "from mpi4py import MPI"], capture_output=True, check=False)
    return "mpi4py is not installed, or finds no MPI library" if found.returncode != 0 else None


@dataclass(frozen=True)
class Ended:
    """A job that came to its end."""

    code: int
    text: str  # all that it said
    seconds: float

    def errors(self) -> list[str]:
        """Return the lines that say what is wrong."""
        # pdsh puts the node before a line.
        return re.findall(r"^(?:node\d+: )?(error: .*)$", self.text, re.MULTILINE)


class Running:
    """A command on one host."""

    def __init__(self, command: list[str], environment: dict[str, str], said: Path) -> None:
        self.said, self.began = said, time.monotonic()
        with open(said, "w") as out:
            self.process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, limit: float = LIMIT_SECONDS) -> Ended:
        try:
            code = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {limit:g} s\n{self.text[-6000:]}") from None
        return Ended(code, self.text, time.monotonic() - self.began)

    @property
    def text(self) -> str:
        return self.said.read_text(errors="replace")

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)


class Cluster:
    """The hosts node1, node2, ... with SLURM on them."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        self._runs = 0
        self._hosts("up", str(count))
        self._hosts("slurm")

    def environment(self, **variables: str) -> dict[str, str]:
        # No PORT, no SIZE, nothing of a launcher that runs these tests.
        kept = {
            name: os.environ[name] for name in ("HOME", "USER", "LANG", "TORCH_EXTENSIONS_DIR") if name in os.environ
        }
        return {
            **kept,
            "PATH": os.pathsep.join([str(BIN), os.environ["PATH"], "/usr/sbin", "/sbin"]),
            # This checkout and no other, whatever the environment has installed.
            "PYTHONPATH": str(REPOSITORY),
            "VENV": str(BIN.parent),
            "CLUSTER_DIR": str(self.folder),
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            **{"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
            **{"DS_ACCELERATOR": "cpu", "TRITON_INTERPRET": "1", "GLOO_SOCKET_IFNAME": "eth0"},
            **{"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"},
            **variables,
        }

    def _hosts(self, *arguments: str, limit: float = 60) -> str:
        done = subprocess.run(
            [str(HOSTS), *arguments],
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
        assert done.returncode == 0, f"hosts.sh {' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout

    def start(self, node: int, command: list[object], **variables: str) -> Running:
        """Start a command on a node, in the repository's folder."""
        self._runs += 1
        words = [str(HOSTS), "on", str(node), *map(str, command)]
        return Running(words, self.environment(**variables), self.folder / f"run{self._runs}.txt")

    def run(self, node: int, command: list[object], limit: float = LIMIT_SECONDS, **variables: str) -> Ended:
        return self.start(node, command, **variables).wait(limit)

    def on(self, node: int, *command: str) -> str:
        """Run something short on a node."""
        return self._hosts("on", str(node), *command)

    def cut(self, node: int) -> None:
        """Take a node's power away."""
        self._hosts("cut", str(node))

    def bring_back(self, node: int) -> None:
        self._hosts("start", str(node))

    def down(self) -> None:
        self._hosts("down")

    def hostfile(self, nodes: int, slots: int) -> str:
        """Write a hostfile of the first nodes; returns its path."""
        path = self.folder / f"hostfile-{nodes}x{slots}"
        path.write_text("".join(f"node{i} slots={slots}\n" for i in range(1, nodes + 1)))
        return str(path)

    def left(self) -> str:
        """Return the processes that are on the nodes, beside their daemons, once they had time to end."""
        deadline = time.monotonic() + _GONE_SECONDS
        while (found := self._hosts("processes")) and time.monotonic() < deadline:
            time.sleep(0.5)
        return found

    # SLURM

    def submit(self, file: str, *flags: object, options: list[str], **variables: str) -> int:
        """Submit a job file of launch/, unchanged; returns the job's number."""
        output = f"--output={self.folder}/job-%j.txt"
        command = ["sbatch", "--parsable", output, *options, f"launch/{file}", *flags]
        submitted = self.run(1, command, 20, **variables)
        assert submitted.code == 0, submitted.text
        return int(submitted.text.split()[-1])

    def said_by(self, job: int) -> str:
        path = self.folder / f"job-{job}.txt"
        return path.read_text(errors="replace") if path.exists() else ""

    def job(self, job: int) -> dict[str, str]:
        """Return what SLURM knows about a job: JobState, ExitCode, Restarts, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.on(1, "scontrol", "show", "job", str(job))))

    def wait_for_job(self, job: int, limit: float = LIMIT_SECONDS) -> Ended:
        began = time.monotonic()
        while (found := self.job(job))["JobState"] in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED"):
            if time.monotonic() - began > limit:
                self.on(1, "scancel", str(job))
                raise AssertionError(f"{found['JobState']} after {limit:g} s\n{self.said_by(job)[-6000:]}")
            time.sleep(0.5)
        code = int(found["ExitCode"].split(":")[0])
        return Ended(code, self.said_by(job), time.monotonic() - began)


def wait_until(what: Callable[[], object], limit: float, running: Callable[[], str]) -> None:
    """Wait until something holds, or fail with what the job has said."""
    deadline = time.monotonic() + limit
    while not what():
        assert time.monotonic() < deadline, f"not within {limit:g} s\n{running()[-6000:]}"
        time.sleep(0.02)


def losses(output: Path) -> list[float]:
    """Return the training losses of a finished run, step by step."""
    last = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def trained_entries(base: Path, output: Path) -> dict[str, list[int]]:
    """Return the flat positions that training changed, for each tensor of the saved model."""
    before, after = load_file(base / "model.safetensors"), load_file(output / "model.safetensors")
    assert before.keys() == after.keys()
    return {name: (before[name] != after[name]).flatten().nonzero().flatten().tolist() for name in before}


def model_bytes(output: Path) -> bytes:
    return (output / "model.safetensors").read_bytes()
