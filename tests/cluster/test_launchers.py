"""Whatever starts the ranks, they train the same.

On the same number of ranks the losses of every step and the saved model are those of any other launcher to the bit:
the ranks see the same rows, and nothing depends on which node a rank is on. Job files go through `sbatch` as they are,
asking for GPUs, which SLURM is made to believe in.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Cluster, Ended, losses, model_bytes, trained_entries
from given import FLAGS, Given

pytestmark = pytest.mark.cluster

#: Starts a run on so many nodes with so many ranks each, and waits for its end.
Launcher = Callable[[Cluster, int, int, dict[str, str]], Ended]


def one_machine(cluster: Cluster, nodes: int, ranks: int, variables: dict[str, str]) -> Ended:
    return cluster.run(1, ["launch/one_machine.sh", *FLAGS], GPUS_PER_NODE=str(nodes * ranks), **variables)


def hostfile(cluster: Cluster, nodes: int, ranks: int, variables: dict[str, str]) -> Ended:
    return cluster.run(1, ["launch/hostfile.sh", *FLAGS], HOSTFILE=cluster.hostfile(nodes, ranks), **variables)


def openmpi(cluster: Cluster, nodes: int, ranks: int, variables: dict[str, str]) -> Ended:
    return cluster.run(1, ["launch/openmpi.sh", *FLAGS], HOSTFILE=cluster.hostfile(nodes, ranks), **variables)


def torchrun(cluster: Cluster, nodes: int, ranks: int, variables: dict[str, str]) -> Ended:
    variables = {**variables, "NODES": str(nodes), "HEAD": "node1", "GPUS_PER_NODE": str(ranks)}
    started = [cluster.start(node, ["launch/torchrun.sh", *FLAGS], **variables) for node in range(nodes, 0, -1)]
    ended = [running.wait() for running in started]
    return Ended(max(end.code for end in ended), "\n".join(end.text for end in ended), ended[0].seconds)


def slurm_torchrun(cluster: Cluster, nodes: int, ranks: int, variables: dict[str, str]) -> Ended:
    variables = {**variables, "GPUS_PER_NODE": str(ranks)}
    return _submit(cluster, "slurm_torchrun.sbatch", [f"--nodes={nodes}"], variables)


def slurm_ranks(cluster: Cluster, nodes: int, ranks: int, variables: dict[str, str]) -> Ended:
    return _submit(cluster, "slurm_ranks.sbatch", [f"--nodes={nodes}", f"--ntasks-per-node={ranks}"], variables)


def _submit(cluster: Cluster, file: str, options: list[str], variables: dict[str, str]) -> Ended:
    job = cluster.submit(file, *FLAGS, options=options, **variables)
    ended = cluster.wait_for_job(job)
    assert cluster.job(job)["TresPerNode"] == "gres:gpu:8"
    return ended


@pytest.mark.parametrize(
    ("nodes", "ranks", "launchers"),
    [
        (2, 1, [one_machine, hostfile, slurm_ranks]),
        (2, 2, [hostfile, openmpi, torchrun, slurm_torchrun, slurm_ranks]),
        (3, 1, [torchrun, openmpi]),
        (3, 2, [hostfile, slurm_ranks]),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_launchers_train_the_same(
    cluster: Cluster, given: Given, tmp_path: Path, nodes: int, ranks: int, launchers: list[Launcher]
) -> None:
    """Losses, trained entries and the model agree to the bit; each run leaves its record and its log."""
    found = {}
    for launcher in launchers:
        output = tmp_path / launcher.__name__
        ended = launcher(cluster, nodes, ranks, given.variables(output))
        assert ended.code == 0, f"{launcher.__name__}: exit code {ended.code}\n{ended.text[-6000:]}"
        found[launcher.__name__] = output
        _check_record(output, nodes, ranks, one_node=launcher is one_machine)
        print(f"{launcher.__name__} on {nodes} x {ranks}: {ended.seconds:.0f} s")
    first, *others = found
    expected = losses(found[first])
    entries = trained_entries(given.base, found[first])
    assert len(expected) == 8
    assert sum(map(len, entries.values())) > 1000
    for other in others:
        assert losses(found[other]) == expected, f"{other} and {first} lose differently"
        assert trained_entries(given.base, found[other]) == entries, f"{other} and {first} train other entries"
        assert model_bytes(found[other]) == model_bytes(found[first]), f"{other} and {first} save other weights"


def _check_record(output: Path, nodes: int, ranks: int, *, one_node: bool) -> None:
    record = json.loads((output / "launch" / "resolved.json").read_text())
    everywhere = {f"node{i + 1}": list(range(i * ranks, (i + 1) * ranks)) for i in range(nodes)}
    expected = {"node1": list(range(nodes * ranks))} if one_node else everywhere
    # Who gets which ranks is torchrun's choice, by who comes first.
    assert sorted(map(len, record["nodes"].values())) == sorted(map(len, expected.values()))
    assert record["nodes"].keys() == expected.keys()
    assert record["world_size"] == nodes * ranks
    assert record["deepspeed"]["train_batch_size"] == 2 * nodes * ranks
    assert '"auto"' not in json.dumps(record["deepspeed"])
    assert record["lift"]["refresh_interval"] == 3
    assert record["lift"]["lr"] == 2e-3
    assert any("saved to" in log.read_text() for log in (output / "launch").glob("*.log"))
