"""Starts launch/train.py as a user would, within a bound, and finds what it leaves behind."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from segments import segments_of

from lift_ds.runtime.ports import free_port

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "ds_configs"
TRAIN = REPOSITORY / "launch" / "train.py"
BIN = Path(sys.executable).parent

#: Longest time of one launch. It takes 10 to 20 seconds on two idle cores; the rest is for cores that are shared.
LIMIT_SECONDS = 240

#: Every process of a launch inherits this variable, so that one that outlives its parent is found all the same.
_MARK = "LIFT_DS_TEST_LAUNCH"

#: Seconds for the processes of a launch to be gone after its end; the launcher's patience with a rank is 30 at most.
_GONE_SECONDS = 45.0


class Launch:
    """A running command with all its processes."""

    def __init__(self, command: Sequence[str], folder: Path, **variables: str) -> None:
        self.mark = uuid.uuid4().hex
        self.folder, self.command = folder, list(command)
        folder.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join([str(BIN), os.environ["PATH"]])
        environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "GLOO_SOCKET_IFNAME": "lo", **variables, _MARK: self.mark}
        with open(folder / "stdout", "w") as out, open(folder / "stderr", "w") as err:
            self.process = subprocess.Popen(
                self.command,
                cwd=REPOSITORY,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text(errors="replace")

    @property
    def stderr(self) -> str:
        """Standard error; a progress bar's carriage returns end lines."""
        return (self.folder / "stderr").read_text(errors="replace")

    def alive(self) -> list[psutil.Process]:
        """Return every process of this launch that still runs, whoever its parent is now."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(_MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def wait_until(self, what: Callable[[], object], limit: float = LIMIT_SECONDS) -> None:
        """Wait until something holds, or fail with what the launch has said."""
        deadline = time.monotonic() + limit
        while not what():
            assert self.process.poll() is None, f"ended with {self.process.returncode}{self.said()}"
            assert time.monotonic() < deadline, f"not within {limit:g} s{self.said()}"
            time.sleep(0.2)

    def said(self) -> str:
        return f"\n{self.stdout[-4000:]}\n{self.stderr[-8000:]}"

    def end(self) -> None:
        """Kill what is left, and remove the shared memory that the ranks leave."""
        for process in self.alive():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait(10)
        for segment in self.segments():
            segment.unlink(missing_ok=True)

    def segments(self) -> list[Path]:
        """Return the shared memory of the ranks that is left."""
        if "--master_port" not in self.command:
            return []
        return segments_of(self.command[self.command.index("--master_port") + 1])


@dataclass(frozen=True)
class Finished:
    """A launch that came to its end by itself."""

    code: int
    stdout: str
    stderr: str
    output: Path  # --output_dir

    @property
    def text(self) -> str:
        return f"{self.stdout}\n{self.stderr}"

    def refreshes(self) -> list[tuple[int, float]]:
        """Return step and churn of every refresh, in the order of the log."""
        found = re.findall(r"LIFT refresh at step (\d+): .*?churn ([\d.]+)%", self.text)
        return [(int(step), float(churn) / 100) for step, churn in found]


@contextlib.contextmanager
def started(command: Sequence[str], folder: Path, **variables: str) -> Iterator[Launch]:
    """Start a command; nothing of it is left when the block ends."""
    launch = Launch(command, folder, **variables)
    try:
        yield launch
    finally:
        launch.end()


def on_two_ranks(config: Path, *flags: object) -> list[str]:
    """Return the command line of a launch on two ranks."""
    command = [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port()), str(TRAIN)]
    return [*command, "--deepspeed", str(config), *map(str, flags)]


def finish(
    command: Sequence[str], folder: Path, *, limit: float = LIMIT_SECONDS, fails: bool = False, **variables: str
) -> Finished:
    """Run a command to its end; check its exit code, and that no process is left.

    Args:
        command: to run.
        folder: for what it says; `out` in it is where tests have it save.
        limit: seconds.
        fails: whether the command is to fail.
        **variables: of the environment.

    Returns:
        How it ended.
    """
    with started(command, folder, **variables) as launch:
        try:
            code = launch.process.wait(limit)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {limit:g} s{launch.said()}") from None
        assert (code != 0) == fails, f"exit code {code}{launch.said()}"
        _, left = psutil.wait_procs(launch.alive(), timeout=_GONE_SECONDS)
        assert not left, f"left behind: {left}{launch.said()}"
        assert not launch.segments(), "shared memory is left behind"
        return Finished(code, launch.stdout, launch.stderr, folder / "out")
