"""What cannot work ends within seconds, in one error that says what to change, with nothing left on any node.

What the scripts can see they refuse before they start anything; the rest launch/train.py refuses on its ranks, also
when a launcher was called by hand.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import BIN, REPOSITORY, Cluster, Ended, wait_until
from given import FLAGS, Given

pytestmark = pytest.mark.cluster

#: Seconds to refuse before a rank is started: ssh's patience with a host is 5; and on the ranks, where importing takes
#: 10 of them on two shared cores, and the others are given 20 to leave the word to rank 0.
BEFORE, ON_RANKS = 15.0, 75.0


def _check(ended: Ended, *parts: str, limit: float, code: int | None = 2) -> None:
    errors = ended.errors()
    assert ended.code == code or (code is None and ended.code != 0), f"exit code {ended.code}\n{ended.text}"
    assert len(errors) == 1, f"{errors}\n{ended.text}"
    for part in parts:
        assert part in errors[0]
    assert ended.seconds < limit, f"{ended.seconds:.0f} s\n{ended.text}"
    print(f"\n{ended.seconds:.1f} s, exit code {ended.code}: {errors[0]}")


@contextlib.contextmanager
def _listening(cluster: Cluster, node: int, port: int) -> Iterator[None]:
    """Something else that answers at a port of a node."""
    listener = cluster.start(node, [BIN / "python", "-u", "-m", "http.server", port])
    try:
        wait_until(lambda: "Serving" in listener.text, 20, lambda: listener.text)
        yield
    finally:
        listener.kill()


@contextlib.contextmanager
def _without(cluster: Cluster, node: int, folder: Path) -> Iterator[None]:
    """A node on which a folder of the shared storage is not mounted: it has an empty one of its own there."""
    cluster.on(node, "mount", "-t", "tmpfs", "tmpfs", str(folder))
    try:
        yield
    finally:
        cluster.on(node, "umount", str(folder))


@pytest.mark.parametrize("script", ["hostfile.sh", "openmpi.sh"])
def test_a_host_that_does_not_exist(cluster: Cluster, given: Given, tmp_path: Path, script: str) -> None:
    """The hostfile and every host in it that does not answer are named; so for one that is down."""
    hostfile = tmp_path / "hosts"
    hostfile.write_text("node1 slots=1\nnode9 slots=1  # is not there\nnode2 slots=1\n10.77.0.99 slots=1\n")
    ended = cluster.run(1, [f"launch/{script}", *FLAGS], HOSTFILE=str(hostfile), **given.variables(tmp_path / "out"))
    _check(ended, str(hostfile), "node9: ", "10.77.0.99: ", limit=BEFORE)
    assert "node2" not in ended.text


def test_a_port_in_use(cluster: Cluster, given: Given, tmp_path: Path) -> None:
    """By the scripts where PORT is given; by the ranks where nobody has looked before."""
    port, variables = "23456", given.variables(tmp_path / "out", HOSTFILE=cluster.hostfile(2, 1), GPUS_PER_NODE="2")
    with _listening(cluster, 1, int(port)):
        for script in ("one_machine.sh", "hostfile.sh"):
            ended = cluster.run(1, [f"launch/{script}", *FLAGS], PORT=port, **variables)
            _check(ended, f"port {port} is in use on", "PORT", limit=BEFORE)
        variables |= {"NODES": "2", "HEAD": "node1"}
        ended = cluster.run(1, ["launch/torchrun.sh", *FLAGS], PORT=port, **variables)
        _check(ended, f"port {port} is in use on", "PORT", limit=BEFORE)
        by_hand = ["deepspeed", "--num_gpus", 2, "--master_port", port, "launch/train.py"]
        ended = cluster.run(1, [*by_hand, *_flags(given, tmp_path)])
        _check(ended, f"port {port} of node1", "--master_port", limit=ON_RANKS)


def _flags(given: Given, folder: Path) -> list[object]:
    config = REPOSITORY / "ds_configs" / "lift_zero2.json"
    files = ["--model_name_or_path", given.base, "--train_file", given.rows, "--output_dir", folder / "out"]
    return ["--deepspeed", config, *files, *FLAGS]


def test_mpi4py_is_missing(cluster: Cluster, given: Given, tmp_path: Path) -> None:
    """By the script, and by the ranks under an mpirun by hand: each names the command that installs it."""
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").write_text("raise ImportError('No module named mpi4py')\n")
    without = {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    hostfile = cluster.hostfile(2, 1)
    variables = given.variables(tmp_path / "out", HOSTFILE=hostfile, **without)
    ended = cluster.run(1, ["launch/openmpi.sh", *FLAGS], **variables)
    _check(ended, "pip install 'lift_ds[mpi4py]'", limit=BEFORE)
    exports = [word for name in ("PATH", "PYTHONPATH", "DS_ACCELERATOR", "TRITON_INTERPRET") for word in ("-x", name)]
    by_hand = ["mpirun", "-np", 2, "--hostfile", hostfile, *exports, "python", "launch/train.py"]
    ended = cluster.run(1, [*by_hand, *_flags(given, tmp_path)], **without)
    _check(ended, "pip install 'lift_ds[mpi4py]'", limit=ON_RANKS)


def test_the_shared_folder_is_missing_on_a_node(cluster: Cluster, given: Given, tmp_path: Path) -> None:
    """Through ssh where there is a hostfile; by the ranks elsewhere, which name the node and the folder."""
    shared = tmp_path / "shared"
    shared.mkdir()
    variables = given.variables(shared / "out", GPUS_PER_NODE="1")
    with _without(cluster, 2, shared):
        for script in ("hostfile.sh", "openmpi.sh"):
            hostfile = cluster.hostfile(2, 1)
            ended = cluster.run(1, [f"launch/{script}", *FLAGS], HOSTFILE=hostfile, **variables)
            _check(ended, "node2: does not see", str(shared / "out"), limit=BEFORE)
        # By the doctor where a script asks it, else by the ranks themselves.
        for file, asked in (("slurm_ranks.sbatch", "0"), ("slurm_torchrun.sbatch", "1")):
            options = ["--nodes=2", "--ntasks-per-node=1"]
            job = cluster.submit(file, *FLAGS, options=options, **{**variables, "DOCTOR": asked})
            ended = cluster.wait_for_job(job)
            _check(ended, "is not the same folder on all nodes", "on node2", limit=ON_RANKS, code=None)
            assert cluster.job(job)["JobState"] == "FAILED"
            assert cluster.job(job)["Restarts"] == "0"


def test_a_deepspeed_file_that_does_not_match(cluster: Cluster, given: Given, tmp_path: Path) -> None:
    """A batch size of the file that so many ranks, or the flags, do not make: both values are named."""
    content = json.loads((REPOSITORY / "ds_configs" / "lift_zero2.json").read_text())
    for key, value, has in (
        ("train_batch_size", 64, "2 rank(s): train_batch_size=64 where the run has train_batch_size=4"),
        ("train_micro_batch_size_per_gpu", 8, "--per_device_train_batch_size 2 contradicts"),
    ):
        path = tmp_path / f"{key}.json"
        path.write_text(json.dumps({**content, key: value}))
        variables = given.variables(tmp_path / key, DS_CONFIG=str(path), HOSTFILE=cluster.hostfile(2, 1))
        ended = cluster.run(1, ["launch/openmpi.sh", *FLAGS], **variables)
        _check(ended, f"{key}={value}", has, limit=ON_RANKS)


def test_a_node_that_does_not_come(cluster: Cluster, given: Given, tmp_path: Path) -> None:
    """Who meets waits for MEETING seconds, and then says who is missing: the doctor, torchrun itself, the ranks."""
    variables = given.variables(tmp_path / "out", GPUS_PER_NODE="1", NODES="2", HEAD="node1", MEETING="10")
    ended = cluster.run(1, ["launch/torchrun.sh", *FLAGS], **variables)
    _check(ended, "rank 1: not come to node1:29500 within 10 s; there are node1", limit=40)
    ended = cluster.run(1, ["launch/torchrun.sh", *FLAGS], DOCTOR="0", **variables)
    assert ended.code != 0
    assert "RendezvousTimeoutError" in ended.text
    assert ended.seconds < 40, ended.text
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "node1", "MASTER_PORT": "23457"}
    command = ["python", "launch/train.py", *_flags(given, tmp_path)]
    ended = cluster.run(1, command, LIFT_DS_MEETING_SECONDS="5", **alone)
    _check(ended, "ranks 1, 2 of 3 have not come to node1:23457 within 5 s", limit=ON_RANKS)


def test_the_run_ends_with_pdsh(cluster: Cluster, given: Given, tmp_path: Path) -> None:
    """pdsh killed outright with its connections: no signal reaches a node, and the run ends there all the same.

    The ranks say nothing while they train, or writing to a closed connection would end them.
    """
    variables = given.variables(tmp_path / "out", HOSTFILE=cluster.hostfile(2, 1))
    silent = ("--logging_strategy", "no", "--disable_tqdm", True, "--save_strategy", "no", "--refresh_interval", 10**6)
    endless = ["launch/hostfile.sh", *FLAGS, *silent, "--max_steps", 10**6]
    running = cluster.start(1, endless, **variables)
    try:
        wait_until((tmp_path / "out" / "launch" / "resolved.json").exists, 120, lambda: running.text)
        time.sleep(3)
    finally:
        running.kill()
        cluster.on(1, "pkill", "-KILL", "-x", "ssh")  # of this node: it has its own process numbers
    began = time.monotonic()
    assert not cluster.left()
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("wrong", "parts"),
    [
        ({"SIZE": "9B"}, ["SIZE=9B"]),
        ({"DS_CONFIG": "missing.json"}, ["DS_CONFIG=missing.json"]),
        ({"DATA": "missing.json"}, ["DATA=missing.json"]),
        ({"MODEL": ""}, ["SIZE or MODEL"]),
        ({"OUTPUT": "/nowhere/out"}, ["OUTPUT=/nowhere/out", "parent"]),
    ],
    ids=lambda value: "-".join(value),
)
def test_parameters(cluster: Cluster, given: Given, tmp_path: Path, wrong: dict[str, str], parts: list[str]) -> None:
    """A parameter that cannot be used is named with its value, by every script; a job fails for good."""
    variables = {**given.variables(tmp_path / "out"), **wrong, "HOSTFILE": cluster.hostfile(2, 1)}
    for script in ("one_machine.sh", "hostfile.sh", "openmpi.sh", "torchrun.sh"):
        _check(cluster.run(1, [f"launch/{script}", *FLAGS], **variables), *parts, limit=BEFORE)
    for file in ("slurm_ranks.sbatch", "slurm_torchrun.sbatch"):
        ended = cluster.wait_for_job(cluster.submit(file, options=["--ntasks-per-node=1"], **variables))
        _check(ended, *parts, limit=BEFORE)


def test_arguments_that_pdsh_would_change(cluster: Cluster, given: Given, tmp_path: Path) -> None:
    """JSON on the command line loses its quotes on the other node."""
    variables = given.variables(tmp_path / "out", HOSTFILE=cluster.hostfile(2, 1))
    ended = cluster.run(1, ["launch/hostfile.sh", "--lr_scheduler_kwargs", '{"num_cycles": 1}'], **variables)
    _check(ended, "num_cycles", limit=BEFORE)
