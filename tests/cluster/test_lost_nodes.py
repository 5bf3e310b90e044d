"""A node that loses its power during a run: the run ends within its limit, and goes on from its last checkpoint.

The link of the node is gone first, so that no connection is closed: the others hear nothing more. What tells them is
`--stall_timeout` (20 s here, 10 s more for what it does not watch), ssh's own sign of life (30 s), and SLURM's (15 s
here). Started again, a run ends in the weights of one that nothing happened to, to the bit.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cluster import Cluster, losses, model_bytes, wait_until
from given import FLAGS, Given

pytestmark = pytest.mark.cluster

#: Long enough for a node to be lost between the checkpoints.
LONGER = (*FLAGS, "--max_steps", 60, "--save_steps", 20, "--stall_timeout", 20)

_ZERO3 = {"DS_CONFIG": "ds_configs/lift_zero3.json"}

#: Seconds from the loss of a node to the end of what was started: the larger of the two limits, and ending.
NOTICED = 75.0


@pytest.fixture(scope="module")
def undisturbed(_hosts: Cluster, given: Given, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training on two ranks of one node."""
    return _undisturbed(_hosts, given, tmp_path_factory.mktemp("undisturbed") / "out")


@pytest.fixture(scope="module")
def undisturbed_zero3(_hosts: Cluster, given: Given, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in ZeRO-3."""
    return _undisturbed(_hosts, given, tmp_path_factory.mktemp("undisturbed_zero3") / "out", **_ZERO3)


def _undisturbed(hosts: Cluster, given: Given, output: Path, **more: str) -> Path:
    ended = hosts.run(1, ["launch/one_machine.sh", *LONGER], **given.variables(output, GPUS_PER_NODE="2", **more))
    assert ended.code == 0, ended.text
    return output


def _check_same(output: Path, undisturbed: Path) -> None:
    assert len(losses(undisturbed)) == 60
    assert losses(output) == losses(undisturbed)
    assert model_bytes(output) == model_bytes(undisturbed)


@pytest.mark.parametrize("file", ["slurm_ranks.sbatch", "slurm_torchrun.sbatch"])
def test_slurm_continues_a_job_by_itself(
    cluster: Cluster, given: Given, tmp_path: Path, undisturbed: Path, file: str
) -> None:
    """The job goes back into the queue, waits for the node, and continues: nobody submits anything."""
    output = tmp_path / "out"
    variables = given.variables(output, GPUS_PER_NODE="1")
    job = cluster.submit(file, *LONGER, options=["--nodes=2", "--ntasks-per-node=1"], **variables)
    try:
        wait_until((output / "checkpoint-20" / "lift.json").exists, 120, lambda: cluster.said_by(job))
        cluster.cut(2)
        assert not (output / "checkpoint-40" / "lift.json").exists()
        wait_until(lambda: cluster.job(job)["Restarts"] == "1", NOTICED, lambda: cluster.said_by(job))
    finally:
        cluster.bring_back(2)
    ended = cluster.wait_for_job(job)
    assert ended.code == 0, ended.text
    assert "resuming from the newest whole checkpoint" in ended.text
    assert "checkpoint-20" in ended.text
    _check_same(output, undisturbed)


def test_slurm_continues_after_the_time_limit(
    cluster: Cluster, given: Given, tmp_path: Path, undisturbed: Path
) -> None:
    """SLURM's signal ahead of the limit puts the job back into the queue, from where it continues."""
    output = tmp_path / "out"
    job = cluster.submit("slurm_ranks.sbatch", *LONGER, options=["--ntasks-per-node=2"], **given.variables(output))
    wait_until((output / "checkpoint-20" / "lift.json").exists, 120, lambda: cluster.said_by(job))
    cluster.on(1, "scancel", "--signal=USR1", "--batch", str(job))
    ended = cluster.wait_for_job(job)
    assert ended.code == 0, ended.text
    assert cluster.job(job)["Restarts"] == "1", ended.text
    assert "the job goes back into the queue" in ended.text
    _check_same(output, undisturbed)


def test_pdsh_ends_and_continues(cluster: Cluster, given: Given, tmp_path: Path, undisturbed: Path) -> None:
    """The command ends with an error in time and leaves nothing; the same command continues."""
    output = tmp_path / "out"
    variables = given.variables(output, HOSTFILE=cluster.hostfile(2, 1))
    running = cluster.start(1, ["launch/hostfile.sh", *LONGER], **variables)
    try:
        wait_until((output / "checkpoint-20" / "lift.json").exists, 120, lambda: running.text)
        cluster.cut(2)
        ended = running.wait(NOTICED)
        assert ended.code != 0, ended.text
        assert re.search("no progress for 20 s|another rank is gone or does not answer", ended.text), ended.text
        assert not cluster.left()
    finally:
        running.kill()
        cluster.bring_back(2)
    again = cluster.run(1, ["launch/hostfile.sh", *LONGER], **variables)
    assert again.code == 0, again.text
    assert "resuming from the newest whole checkpoint" in again.text
    _check_same(output, undisturbed)


def test_torchrun_ends_and_continues(cluster: Cluster, given: Given, tmp_path: Path, undisturbed_zero3: Path) -> None:
    """The command on the node that is left ends with an error in time; the same commands continue.

    In ZeRO-3, where each node has a copy of the frozen weights.
    """
    output = tmp_path / "out"
    variables = given.variables(output, NODES="2", HEAD="node1", GPUS_PER_NODE="1", **_ZERO3)

    def start() -> list:
        return [cluster.start(node, ["launch/torchrun.sh", *LONGER], **variables) for node in (1, 2)]

    running = start()
    try:
        wait_until((output / "checkpoint-20" / "lift.json").exists, 120, lambda: running[0].text)
        cluster.cut(2)
        ended = running[0].wait(NOTICED)
        assert ended.code != 0, ended.text
    finally:
        for one in running:
            one.kill()
        cluster.bring_back(2)
    ended = [one.wait() for one in start()]
    assert [one.code for one in ended] == [0, 0], ended[0].text
    assert "frozen weights: each of 2 nodes has a copy" in ended[0].text
    _check_same(output, undisturbed_zero3)
