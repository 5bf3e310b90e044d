"""The end of a run whose `deepspeed` command is gone.

    deepspeed (the command)  ->  deepspeed.launcher.launch (one a node)  ->  the ranks

On one machine DeepSpeed 0.19's command passes no signal on: ended alone (`kill PID`, a scheduler, a closing wrapper) it
leaves the node launcher training on, its ports and devices held. The node launcher does pass a signal on to the ranks.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import psutil

#: Seconds between two looks.
_INTERVAL = 1.0

_NODE_LAUNCHER, _COMMAND = "deepspeed.launcher.launch", ("deepspeed", "ds", "deepspeed.launcher.runner")


def end_with_command() -> None:
    """Let the run end when the `deepspeed` command that started it has; the first rank of the machine sees to it.

    Nothing happens under another launcher, or where the node launcher was not started by the command on this machine:
    then whoever started it may leave it running.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    found = _node_launcher_and_command()
    if found is not None:
        threading.Thread(target=_end_after, args=found, name="launcher watch", daemon=True).start()


def _node_launcher_and_command() -> tuple[psutil.Process, psutil.Process] | None:
    try:
        node_launcher = psutil.Process().parent()
        command = node_launcher.parent() if node_launcher else None
        if node_launcher is None or command is None or _NODE_LAUNCHER not in node_launcher.cmdline():
            return None
        # `python .../bin/deepspeed ...`, or `python -m deepspeed.launcher.runner ...`
        names = {os.path.basename(argument) for argument in command.cmdline()[:4]}
    except psutil.Error:
        return None
    return (node_launcher, command) if names.intersection(_COMMAND) else None


def _end_after(node_launcher: psutil.Process, command: psutil.Process) -> None:
    while command.is_running() and command.status() != psutil.STATUS_ZOMBIE:
        time.sleep(_INTERVAL)
    print("the deepspeed command has ended: ending the run", file=sys.stderr, flush=True)
    node_launcher.send_signal(signal.SIGTERM)
