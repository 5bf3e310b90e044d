"""The doctor on hosts with real faults: a healthy cluster has no findings, and each fault is named with its node.

Every host sends at 400 Mbit/s, so that what the cores are busy with decides nothing. The kernel's traffic control slows
links down and closes ports.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import BIN, REPOSITORY, Cluster, Ended

from lift_ds.runtime.ports import free_port

pytestmark = pytest.mark.cluster

HOSTS = ("node1", "node2", "node3")

#: An answer to a request for a connection: SYN and ACK in the flags of a TCP header that follows a plain IP header.
ANSWERS = "match ip protocol 6 0xff match u8 0x12 0x3f at 33"


@contextlib.contextmanager
def _shaped(cluster: Cluster, node: int, *special: str, lost: bool = False) -> Iterator[None]:
    """A node that sends at 400 Mbit/s, and what a filter matches at a tenth of it, or not at all."""
    cluster.on(node, "tc", "qdisc", "add", "dev", "eth0", "root", "handle", "1:", "htb", "default", "10")
    try:
        for number, rate in ((10, "400mbit"), (20, "40mbit")):
            kind = ["classid", f"1:{number}", "htb", "rate", rate, "quantum", "60000"]
            cluster.on(node, "tc", "class", "add", "dev", "eth0", "parent", "1:", *kind)
        if lost:
            cluster.on(node, "tc", "qdisc", "add", "dev", "eth0", "parent", "1:20", "blackhole")
        for match in special:
            words = ["parent", "1:", "protocol", "ip", "u32", *match.split(), "flowid", "1:20"]
            cluster.on(node, "tc", "filter", "add", "dev", "eth0", *words)
        yield
    finally:
        cluster.on(node, "tc", "qdisc", "del", "dev", "eth0", "root")


@contextlib.contextmanager
def _mounted(cluster: Cluster, node: int, folder: str, size: str) -> Iterator[None]:
    """A node that has an empty folder of its own there."""
    cluster.on(node, "mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder)
    try:
        yield
    finally:
        cluster.on(node, "umount", folder)


class Doctor:
    """The doctor on three nodes, one process each."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder

    def examine(
        self, *flags: object, nodes: tuple[int, ...] = (1, 2, 3), of_node: dict[int, dict[str, str]] | None = None
    ) -> tuple[Ended, list[dict[str, Any]]]:
        """Start it on these nodes; return how rank 0 ended, and what it found.

        Args:
            flags: of the command.
            nodes: where it is started.
            of_node: variables of one node alone.
        """
        record = self.folder / "record.json"
        record.unlink(missing_ok=True)
        given = ["--output-dir", self.folder / "shared" / "run", "--hosts", ",".join(HOSTS), "--min-write", "1e-6"]
        command = [BIN / "python", "-m", "lift_ds.doctor", *given, "--json", record, *flags]
        meeting = {"WORLD_SIZE": "3", "MASTER_ADDR": "node1", "MASTER_PORT": str(free_port())}
        started = [
            self.cluster.start(
                node, command, RANK=str(node - 1), LOCAL_RANK="0", LIFT_DS_MEETING_SECONDS="30", **meeting,
                **(of_node or {}).get(node, {}),
            )
            for node in nodes
        ]  # fmt: skip
        ended = [running.wait(120) for running in started]
        print(f"\n{ended[0].seconds:.1f} s, exit code {ended[0].code}:\n{ended[0].text}")
        for other in ended[1:]:  # rank 0 alone speaks, unless it is not reached
            assert "lift-ds doctor" not in other.text
            assert other.code == ended[0].code
        return ended[0], json.loads(record.read_text())["findings"]


@pytest.fixture
def doctor(cluster: Cluster, tmp_path: Path) -> Doctor:
    (tmp_path / "shared").mkdir()
    return Doctor(cluster, tmp_path)


def _named(found: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return sorted((one["check"], one["where"]) for one in found)


def test_a_healthy_cluster_and_slow_links(cluster: Cluster, doctor: Doctor) -> None:
    """Nothing is found where all links are alike; a link, or a node, at a tenth of the rate is named."""
    with _shaped(cluster, 1), _shaped(cluster, 2), _shaped(cluster, 3):
        ended, found = doctor.examine()
        assert (ended.code, found) == (0, [])
    with _shaped(cluster, 1, "match ip dst 10.77.0.3/32"), _shaped(cluster, 2), _shaped(cluster, 3):
        ended, found = doctor.examine()
        assert (ended.code, _named(found)) == (1, [("bandwidth", "node1 and node3")])
    every = "match ip dst 10.77.0.0/24"
    with _shaped(cluster, 1), _shaped(cluster, 2, every), _shaped(cluster, 3):
        ended, found = doctor.examine()
        assert (ended.code, _named(found)) == (1, [("bandwidth", "node2")])


def test_each_fault_is_named_with_its_node(cluster: Cluster, doctor: Doctor, tmp_path: Path) -> None:
    """A small /dev/shm, a folder that is not shared, a package of another version: one finding each, on three nodes."""
    fake = tmp_path / "fake" / "transformers-9.9.9.dist-info"
    fake.mkdir(parents=True)
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 9.9.9\n")
    other = {3: {"PYTHONPATH": f"{fake.parent}:{REPOSITORY}"}}
    with _mounted(cluster, 1, "/dev/shm", "16m"), _mounted(cluster, 2, str(tmp_path / "shared"), "64m"):
        ended, found = doctor.examine("--quick", of_node=other)
    assert ended.code == 2
    assert _named(found) == [("output folder", "node2"), ("shared memory", "node1"), ("versions", "node3")]
    assert "transformers is 9.9.9" in ended.text
    assert not (tmp_path / "shared" / "run").exists()  # it was not there before


def test_closed_ports(cluster: Cluster, doctor: Doctor) -> None:
    """A node that lets nobody in is named by the others; it reaches rank 0 itself, so nobody is absent."""
    with _shaped(cluster, 3, ANSWERS, lost=True):
        ended, found = doctor.examine()
    assert (ended.code, _named(found)) == (2, [("contact", "node3")])
    assert "it is not reached by node1, node2: timed out" in ended.text


def test_a_node_that_does_not_answer(doctor: Doctor) -> None:
    """It is named within the limit of the meeting, beside what is found of the others."""
    ended, found = doctor.examine(nodes=(1, 2))
    assert (ended.code, _named(found)) == (2, [("present", "node3")])
    assert ended.seconds < 75


def test_scripts_look_at_the_nodes_before_they_start(cluster: Cluster, tmp_path: Path) -> None:
    """An error ends the script before anything is started, and DOCTOR=0 starts without a look."""
    shared = tmp_path / "shared"
    shared.mkdir()
    variables = {"OUTPUT": str(shared / "out"), "NODES": "2", "HEAD": "node1", "GPUS_PER_NODE": "1", "MEETING": "20"}
    with _mounted(cluster, 2, str(shared), "64m"):
        running = [cluster.start(node, ["launch/torchrun.sh", "--no_such_flag"], **variables) for node in (2, 1)]
        second, first = (one.wait(100) for one in running)
    assert (first.code, second.code) == (2, 2)
    (error,) = first.errors()
    assert error.startswith("error: node2: --output-dir")
    assert "no_such_flag" not in first.text  # nothing was started
    variables |= {"NODES": "1", "DOCTOR": "0"}
    ended = cluster.run(1, ["launch/torchrun.sh", "--no_such_flag", "1"], **variables)
    assert "lift-ds doctor" not in ended.text
    assert "no_such_flag" in ended.text
