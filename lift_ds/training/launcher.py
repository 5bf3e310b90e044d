"""How a rank learns its number from the program that started it, and how it ends together with that program.

    deepspeed (the command)  ->  [pdsh -> ssh -> sshd ->]  deepspeed.launcher.launch (one a node)  ->  the ranks
    torchrun (one a node)    ->  the ranks
    mpirun, mpiexec, srun    ->  the ranks, which have to ask which ones they are

DeepSpeed 0.19's command passes no signal on: ended alone (`kill PID`, a scheduler, a closing wrapper) it leaves the
node launchers training on, their ports and devices held. A node launcher does pass a signal on to its ranks.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping

import psutil

from lift_ds.runtime.ports import free_port

#: How many ranks an MPI's launcher has started on this node -> which one this is, and how many there are: Open MPI;
#: MPICH and those made of it (Intel MPI, MVAPICH). SLURM sets PMI_RANK too, but neither of the first ones.
_MPI_RANKS = {
    "OMPI_COMM_WORLD_LOCAL_SIZE": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "MPI_LOCALNRANKS": ("PMI_RANK", "PMI_SIZE"),
}

#: Seconds between two looks.
_INTERVAL = 1.0

_NODE_LAUNCHER, _COMMAND = "deepspeed.launcher.launch", ("deepspeed", "ds", "deepspeed.launcher.runner")


def count_local_ranks() -> None:
    """Set LOCAL_SIZE, by which DeepSpeed counts the devices of a CPU machine. Call it before DeepSpeed is imported.

    torchrun, mpirun, mpiexec and srun have other names for it.
    """
    named = ("LOCAL_WORLD_SIZE", *_MPI_RANKS, "SLURM_NTASKS_PER_NODE", "WORLD_SIZE")
    found = (os.environ[name] for name in named if os.environ.get(name))
    os.environ.setdefault("LOCAL_SIZE", next(found, "1"))


def find_ranks() -> None:
    """Set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT where an MPI or `srun` started this process.

    DeepSpeed's command and torchrun have set them already. Under an MPI's launcher all ranks call this together: rank 0
    chooses a free port, and MPI sends the port and the address of rank 0 to the others. MPI is not used again.

    Raises:
        ValueError: mpi4py is missing or belongs to another MPI, or nobody has named the node of rank 0.
    """
    if "RANK" in os.environ:
        return
    of_mpi = next((names for local, names in _MPI_RANKS.items() if local in os.environ), None)
    if of_mpi is not None:
        rank, count = (os.environ[name] for name in of_mpi)
        os.environ["RANK"] = rank  # for who speaks, if what comes now fails
        os.environ.update(_of_mpi(int(count)))
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        os.environ.update(_of_slurm(os.environ))


def _of_mpi(count: int) -> dict[str, str]:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: there is no MPI library that it could load
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"ranks that mpirun starts need mpi4py ({reason}): pip install 'lift_ds[mpi4py]'") from error

    world = MPI.COMM_WORLD
    if world.size != count:
        raise ValueError(
            f"mpi4py uses {MPI.get_vendor()[0]}, which is not the MPI whose launcher started these {count} ranks, so "
            "each takes itself to be alone: load that MPI's module, or name its library in MPI4PY_LIBMPI"
        )
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    one_machine = local.size == world.size
    meeting = world.bcast((own_address(one_machine), str(free_port())) if world.rank == 0 else None)
    found = {
        **{"RANK": str(world.rank), "WORLD_SIZE": str(world.size)},
        **{"LOCAL_RANK": str(local.rank), "LOCAL_WORLD_SIZE": str(local.size)},
        **{"MASTER_ADDR": meeting[0], "MASTER_PORT": meeting[1]},
    }
    # At the end of the process it would wait for ranks that may have failed. mpirun still ends all with the first.
    MPI.Finalize()
    return found


def _of_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise ValueError(
            f"srun started {environment['SLURM_STEP_NUM_TASKS']} ranks, but {' and '.join(missing)} is not set; "
            "launch/slurm_ranks.sbatch sets MASTER_ADDR to the first node of the job and MASTER_PORT to a free port"
        )
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
    }


def own_address(one_machine: bool) -> str:
    """Return an IPv4 address by which the other nodes reach this one: of the interface that was named, or the first.

    Args:
        one_machine: whether all ranks are on this machine.

    Raises:
        ValueError: no interface is up.
    """
    if one_machine:
        return "127.0.0.1"
    addresses = {
        name: [entry.address for entry in entries if entry.family == socket.AF_INET]
        for name, entries in psutil.net_if_addrs().items()
    }
    named = os.environ.get("GLOO_SOCKET_IFNAME") or os.environ.get("NCCL_SOCKET_IFNAME") or ""
    wanted = [name for name in named.split(",") if addresses.get(name)]
    others = [name for name, stats in psutil.net_if_stats().items() if stats.isup and addresses.get(name)]
    for name in [*wanted, *others]:
        if not addresses[name][0].startswith("127."):
            return addresses[name][0]
    raise ValueError(f"{socket.gethostname()}, the node of rank 0, has no network interface that is up")


def end_with_command() -> None:
    """Let the run end when the `deepspeed` command that started it has, or the node launcher between the two.

    On other machines the command counts as ended when its ssh connection is. The first rank of each machine then ends
    the node launcher. Every rank watches the node launcher, since one that was killed ends nobody. Nothing is watched
    under another launcher, or where something else has started the node launcher.
    """
    found = _node_launcher_and_command()
    if found is not None:
        threading.Thread(target=_end_after, args=found, name="launcher watch", daemon=True).start()


def _node_launcher_and_command() -> tuple[psutil.Process, psutil.Process] | None:
    try:
        node_launcher = psutil.Process().parent()
        if node_launcher is None or _NODE_LAUNCHER not in node_launcher.cmdline():
            return None
        started_by = node_launcher.parents()
        # `python .../bin/deepspeed ...`, or `python -m deepspeed.launcher.runner ...`
        if started_by and {os.path.basename(word) for word in started_by[0].cmdline()[:4]}.intersection(_COMMAND):
            return node_launcher, started_by[0]
        # pdsh's ssh: sshd -> sshd of the connection -> a shell -> the node launcher
        for ancestor in started_by[:2]:
            if ancestor.name().startswith("sshd"):
                return node_launcher, ancestor
    except psutil.Error:
        pass
    return None


def _end_after(node_launcher: psutil.Process, command: psutil.Process) -> None:
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    while _runs(node_launcher) and (_runs(command) or not first):
        time.sleep(_INTERVAL)
    if first:
        gone = "command" if _runs(node_launcher) else "launcher of this node"
        with contextlib.suppress(OSError):  # its connection may have been this process's standard error
            print(f"the deepspeed {gone} has ended: ending the run", file=sys.stderr, flush=True)
    with contextlib.suppress(psutil.NoSuchProcess):
        node_launcher.send_signal(signal.SIGTERM)
        return
    os.kill(os.getpid(), signal.SIGTERM)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
