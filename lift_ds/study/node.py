"""One node of a job: starts its ranks, ends them all when one fails, the limit passes, or whoever started it is gone.

python -m lift_ds.study.node FOLDER --node I --address NAME
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

#: Files of a job, see `lift_ds.study.job`.
JOB, MEETING, FAILED = "job.json", "meeting.json", "failed.json"

#: The folder that has lift_ds, from which ranks are started.
ROOT = Path(__file__).parents[2]

#: Seconds between two looks at the ranks, and that an ended rank has before it is killed.
_INTERVAL, _GRACE = 0.1, 5.0


Job = dict[str, Any]


class Ended(Exception):
    """The job is to end now; says why."""


def main(arguments: list[str] | None = None) -> int:
    """Run the ranks of this node; 0 when all of them have done their work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--node", type=int, required=True, help="number of this node, from 0")
    parser.add_argument("--address", default=socket.gethostname(), help="of the first node, where the ranks meet")
    parser.add_argument("--watch_stdin", action="store_true", help="end when the standard input does")
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _on_signal)
    signal.signal(signal.SIGHUP, _on_signal)
    job = json.loads((args.folder / JOB).read_text())
    deadline = time.monotonic() + job["limit"]
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        address, port = meet(args.folder, args.node, args.address, deadline)
        ranks += (start(args.folder, job, args.node, local, address, port) for local in range(ranks_per_node(job)))
        wait(args.folder, job, args.node, ranks, deadline, args.watch_stdin)
    except Ended as end:
        note_failure(args.folder, str(end))
        print(f"error: {end}", file=sys.stderr)
        return 1
    finally:
        end_all(ranks)
    return 0


def ranks_per_node(job: Job) -> int:
    """Return how many ranks a node has."""
    found: int = job["cell"]["ranks"] // job["cell"]["nodes"]
    return found


def write_whole(path: Path, content: Any) -> None:
    """Write JSON such that a reader sees all of it or no file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content))
    os.replace(partial, path)


def note_failure(folder: Path, text: str) -> None:
    """Leave word of a failure, unless another was first."""
    partial = folder / f".failed.{os.uname().nodename}.{os.getpid()}"
    partial.write_text(json.dumps(text))
    try:
        os.link(partial, folder / FAILED)
    except FileExistsError:
        pass
    finally:
        partial.unlink()


def _on_signal(number: int, frame: FrameType | None) -> None:
    raise Ended(f"{socket.gethostname()} was told to end by {signal.Signals(number).name}")


def meet(folder: Path, node: int, address: str, deadline: float) -> tuple[str, int]:
    """Return where the ranks meet: the first node chooses a port, the others wait for its word."""
    path = folder / MEETING
    if node == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            write_whole(path, [address, probe.getsockname()[1]])
    while not path.exists():
        if time.monotonic() > deadline:
            raise Ended(f"{socket.gethostname()}: the first node has not said where the ranks meet")
        time.sleep(_INTERVAL)
        os.listdir(folder)  # network file systems remember what they have not seen
    found = json.loads(path.read_text())
    return found[0], found[1]


def start(folder: Path, job: Job, node: int, local: int, address: str, port: int) -> subprocess.Popen[bytes]:
    """Start a rank."""
    size = ranks_per_node(job)
    rank = node * size + local
    environment = {
        **os.environ, **job["environment"], "DS_ACCELERATOR": job["device"], "OMP_NUM_THREADS": str(job["threads"]),
        "RANK": str(rank), "LOCAL_RANK": str(local), "WORLD_SIZE": str(job["cell"]["ranks"]), "LOCAL_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": address, "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": job["interface"], "NCCL_SOCKET_IFNAME": job["interface"], "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    if job["device"] == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "lift_ds.study.worker", str(folder)]
    with (folder / f"rank{rank}.log").open("wb") as log:
        return subprocess.Popen(
            command, env=environment, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )


def wait(
    folder: Path, job: Job, node: int, ranks: list[subprocess.Popen[bytes]], deadline: float, watch_stdin: bool
) -> None:
    """Wait until all ranks are done.

    Raises:
        Ended: one has failed, the limit has passed, or whoever started this node is gone.
    """
    while any(code := [rank.poll() for rank in ranks]) or None in code:
        for local, ended in enumerate(code):
            if ended:
                number = node * ranks_per_node(job) + local
                last = _last_line(folder / f"rank{number}.log")
                raise Ended(f"rank {number} on {socket.gethostname()} ended with {ended}: {last}")
        if time.monotonic() > deadline:
            raise Ended(f"ranks on {socket.gethostname()} were not done within {job['limit']:g} s")
        if watch_stdin and select.select([sys.stdin], [], [], 0)[0] and not os.read(sys.stdin.fileno(), 1):
            raise Ended(f"the study that started {socket.gethostname()} is gone")
        time.sleep(_INTERVAL)


def end_all(ranks: list[subprocess.Popen[bytes]]) -> None:
    """End what still runs."""
    for action in (subprocess.Popen.terminate, subprocess.Popen.kill):
        for rank in ranks:
            if rank.poll() is None:
                action(rank)
        deadline = time.monotonic() + _GRACE
        while time.monotonic() < deadline and any(rank.poll() is None for rank in ranks):
            time.sleep(_INTERVAL)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:500] if lines else "no output"


if __name__ == "__main__":
    sys.exit(main())
