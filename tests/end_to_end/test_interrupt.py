"""Ctrl-C and SIGTERM end a two-rank training with all its processes.

A terminal sends SIGINT to the whole group, and so do `timeout` and most schedulers with SIGTERM; DeepSpeed's node
launcher, `deepspeed.launcher.launch`, passes a signal of its own on to the ranks. No rank may stay: it would hold its
port, its device and, waiting in a collective, a core.

A signal to the `deepspeed` command alone is another matter: on one machine DeepSpeed 0.19 has no handler there, so
the command ends and the node launcher would train on. The first rank notices that the command is gone.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from launches import BIN, CONFIGS, REPOSITORY, Launch, on_two_ranks, started
from material import Material

#: The node launcher kills ranks that have not ended 30 seconds after its signal to them, one rank after the other.
GONE_SECONDS = 75.0

Send = Callable[[Launch, signal.Signals], None]


def to_group(launch: Launch, number: signal.Signals) -> None:
    os.killpg(launch.process.pid, number)  # the session's leader names its group


def to_node_launcher(launch: Launch, number: signal.Signals) -> None:
    (node_launcher,) = psutil.Process(launch.process.pid).children()
    node_launcher.send_signal(number)


def check_gone(launch: Launch, number: signal.Signals, send: Send, limit: float) -> None:
    """Wait until a launch trains, send the signal, and check that all its processes end."""
    launch.wait_until(lambda: "{'loss': " in launch.stdout)
    processes = psutil.Process(launch.process.pid).children(recursive=True)
    assert sum("train.py" in " ".join(p.cmdline()) for p in processes) >= 2
    send(launch, number)
    _, left = psutil.wait_procs(processes, timeout=limit)
    assert not left, f"still there: {left}{launch.said()}"
    assert launch.process.wait(limit) != 0
    assert not launch.alive()
    # DeepSpeed's command shows a traceback of its own on Ctrl-C; the ranks show none.
    assert 'train.py", line' not in launch.stderr, launch.said()


#: A training that does not end by itself.
ENDLESS = ("--max_steps", 100_000, "--eval_split_size", 0, "--refresh_interval", 1000)


def endless(material: Material, folder: Path) -> list[str]:
    """Return the command line of a training that does not end by itself."""
    return on_two_ranks(CONFIGS / "lift_zero2.json", *material.flags(folder / "out", *ENDLESS))


@pytest.mark.parametrize(
    ("number", "send"),
    [
        pytest.param(signal.SIGINT, to_group, id="ctrl-c"),
        pytest.param(signal.SIGTERM, to_node_launcher, id="sigterm-to-node-launcher", marks=pytest.mark.slow),
        # The same handlers as the two above, the other way round; a launch each.
        pytest.param(signal.SIGTERM, to_group, id="sigterm-to-group", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, to_node_launcher, id="sigint-to-node-launcher", marks=pytest.mark.slow),
    ],
)
def test_no_process_survives_a_signal(number: signal.Signals, send: Send, material: Material, tmp_path: Path) -> None:
    with started(endless(material, tmp_path), tmp_path) as launch:
        check_gone(launch, number, send, GONE_SECONDS)


@pytest.mark.slow  # a launch each
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_survives_a_signal_to_the_command_alone(
    number: signal.Signals, material: Material, tmp_path: Path
) -> None:
    with started(endless(material, tmp_path), tmp_path) as launch:
        check_gone(launch, number, lambda launch, number: launch.process.send_signal(number), GONE_SECONDS)


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["deepspeed.launcher.launch", "bin/deepspeed"])
def test_a_script_fails_when_what_it_has_started_is_killed(killed: str, material: Material, tmp_path: Path) -> None:
    """DeepSpeed's command returns 0 when its node launcher was killed, as by the kernel for want of memory."""

    def kill(launch: Launch, number: signal.Signals) -> None:
        processes = psutil.Process(launch.process.pid).children(recursive=True)
        (one,) = [process for process in processes if killed in " ".join(process.cmdline()[:4])]
        one.send_signal(number)

    given = {"MODEL": material.base, "DATA": material.instructions, "OUTPUT": tmp_path / "out", "GPUS_PER_NODE": 2}
    variables = {name: str(value) for name, value in given.items()} | {"VENV": str(BIN.parent)}
    flags = [str(flag) for flag in (*material.flags(tmp_path / "out")[6:], *ENDLESS)]
    with started([str(REPOSITORY / "launch/one_machine.sh"), *flags], tmp_path, **variables) as launch:
        check_gone(launch, signal.SIGKILL, kill, GONE_SECONDS)
