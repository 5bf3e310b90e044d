"""Which rank a process is under mpirun and srun, the rendezvous of the ranks, and the record of a start.

What starts real ranks on several hosts is in tests/cluster.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lift_ds.runtime.ports import free_port
from lift_ds.training import launcher, record, rendezvous


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No variable of a launcher is set, and none is left set."""
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", rendezvous.LIMIT)
    for name in ours:
        monkeypatch.setenv(name, "")  # so that it is restored at the end
        monkeypatch.delenv(name)
    for name in os.environ:
        if name.startswith(("OMPI_", "MPI_", "PMI_", "SLURM_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)
    return monkeypatch


def _set(environment: pytest.MonkeyPatch, **variables: object) -> None:
    for name, value in variables.items():
        environment.setenv(name, str(value))


def test_slurm_tells_the_rank(environment: pytest.MonkeyPatch) -> None:
    """In a step of several tasks SLURM's numbers are the rank's."""
    _set(environment, SLURM_STEP_NUM_TASKS=4, SLURM_PROCID=3, SLURM_LOCALID=1, MASTER_ADDR="node1", MASTER_PORT=29500)
    launcher.find_ranks()
    assert [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == ["3", "1", "4"]


def test_slurm_without_a_rendezvous_point_is_refused(environment: pytest.MonkeyPatch) -> None:
    """srun alone does not say where the ranks meet; the error names what is missing and who sets it."""
    _set(environment, SLURM_STEP_NUM_TASKS=4, SLURM_PROCID=3, SLURM_LOCALID=1, MASTER_PORT=29500)
    with pytest.raises(ValueError, match=r"MASTER_ADDR is not set; launch/slurm_ranks\.sbatch"):
        launcher.find_ranks()


@pytest.mark.parametrize("tasks", ["1", None])
def test_one_process_within_a_job_stays_one(environment: pytest.MonkeyPatch, tasks: str | None) -> None:
    """A batch script has SLURM_PROCID and SLURM_NTASKS too, and is no rank."""
    _set(environment, SLURM_PROCID=0, SLURM_NTASKS=8)
    if tasks:
        _set(environment, SLURM_STEP_NUM_TASKS=tasks)
    launcher.find_ranks()
    assert "RANK" not in os.environ


_OPEN_MPI = {"OMPI_COMM_WORLD_LOCAL_SIZE": 2, "OMPI_COMM_WORLD_SIZE": 2, "OMPI_COMM_WORLD_RANK": 1}
_MPICH = {"MPI_LOCALNRANKS": 2, "PMI_SIZE": 2, "PMI_RANK": 1, "SLURM_STEP_NUM_TASKS": 2, "SLURM_PROCID": 0}


def test_a_rank_that_is_known_is_kept(environment: pytest.MonkeyPatch) -> None:
    """torchrun within srun, or within mpirun, has the word."""
    _set(environment, RANK=5, SLURM_STEP_NUM_TASKS=2, SLURM_PROCID=1, **_OPEN_MPI)
    launcher.find_ranks()
    assert os.environ["RANK"] == "5"


@pytest.mark.parametrize("variables", [_OPEN_MPI, _MPICH], ids=["Open MPI", "MPICH within SLURM"])
def test_an_mpi_without_mpi4py_is_refused(environment: pytest.MonkeyPatch, variables: dict[str, int]) -> None:
    """The error says what to install; the rank is known by then, so that one alone says it."""
    _set(environment, **variables)
    environment.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ValueError, match=r"pip install 'lift_ds\[mpi4py\]'"):
        launcher.find_ranks()
    assert os.environ["RANK"] == "1"


def test_an_mpi4py_of_another_mpi_is_refused(environment: pytest.MonkeyPatch) -> None:
    """It would take each rank to be alone. In a process of its own, which begins with MPI."""
    _set(environment, **_MPICH)
    command = [sys.executable, "-c", "from lift_ds.training.launcher import find_ranks; find_ranks()"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False).stderr
    if "need mpi4py" in said:
        pytest.skip("there is no mpi4py, or no MPI")
    assert "is not the MPI whose launcher started these 2 ranks" in said
    assert "MPI4PY_LIBMPI" in said


@pytest.mark.parametrize("address", ["", "127.0.0.1"])
def test_a_port_that_is_taken_is_refused(environment: pytest.MonkeyPatch, address: str) -> None:
    """By rank 0, at once, with the port and the flag that changes it."""
    with socket.socket() as taken:
        taken.bind((address, 0))
        taken.listen()
        port = taken.getsockname()[1]
        _set(environment, RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        with pytest.raises(ValueError, match=rf"port {port} of .* is in use .* --master_port"):
            rendezvous.meet()


def test_ranks_that_do_not_come_are_named(environment: pytest.MonkeyPatch) -> None:
    """Within the limit, by their numbers."""
    _set(environment, RANK=0, WORLD_SIZE=3, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    environment.setenv(rendezvous.LIMIT, "1")
    with pytest.raises(ValueError, match=r"ranks 1, 2 of 3 have not come to 127\.0\.0\.1:\d+ within 1 s"):
        rendezvous.meet()


def test_a_rank_0_that_does_not_answer_is_named(environment: pytest.MonkeyPatch) -> None:
    """The others say where they looked for it."""
    _set(environment, RANK=1, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    environment.setenv(rendezvous.LIMIT, "1")
    with pytest.raises(ValueError, match=r"rank 1 on \S+ does not reach rank 0 at 127\.0\.0\.1:\d+ within 1 s"):
        rendezvous.meet()


@pytest.mark.parametrize("limit", ["soon", "0", "-3"])
def test_a_limit_that_is_none_is_refused(environment: pytest.MonkeyPatch, limit: str) -> None:
    _set(environment, RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=1)
    environment.setenv(rendezvous.LIMIT, limit)
    with pytest.raises(ValueError, match=rf"{rendezvous.LIMIT}='{limit}'"):
        rendezvous.meet()


def test_one_process_meets_nobody(environment: pytest.MonkeyPatch) -> None:
    """Without a launcher there is nothing to wait for."""
    environment.setattr(rendezvous, "_store", None)
    rendezvous.meet()
    assert rendezvous._store is None


def test_a_record_is_plain_json(tmp_path: Path) -> None:
    """Accelerate writes an infinity into DeepSpeed's settings, which is no JSON; folders are made."""
    path = tmp_path / "launch" / "resolved.json"
    record.write(path, {"steps_per_print": float("inf"), "folder": tmp_path, "betas": (0.9, 0.95)})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    content = json.loads(path.read_text(), parse_constant=refuse)
    assert content == {"steps_per_print": "Infinity", "folder": str(tmp_path), "betas": [0.9, 0.95]}
    assert [entry.name for entry in path.parent.iterdir()] == ["resolved.json"]
