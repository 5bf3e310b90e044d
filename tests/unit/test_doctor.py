"""What the doctor finds: each kind of trouble is named with its node and nothing else is; a healthy cluster has none.

Findings are functions of what all nodes have said, so no process is needed but for the one real run. Hosts with real
faults are in tests/cluster/test_examined_nodes.py.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lift_ds.doctor import bandwidth, devices, examination, findings, links, planned, report, transport
from lift_ds.doctor.examination import Observed, Settings
from lift_ds.doctor.findings import ERROR, WARNING, Limits
from lift_ds.doctor.limits import within
from lift_ds.doctor.meeting import Meeting, join
from lift_ds.runtime.ports import free_port

GB = 10**9
LIMITS = Limits(inside=100 * GB, across=20 * GB, write=0.05 * GB)


def _facts(number: int) -> dict[str, Any]:
    device = {"name": "NVIDIA H100 80GB HBM3", "driver": "570.1", "total": 85 * GB, "used": GB // 2}
    return {
        "versions": {"python": "3.12.1", "torch": "2.13.0", "lift_ds": "0.1.0", "NCCL": "2.27.3", "driver": "570.1"},
        "shm": 8 * GB,
        "locked": None,
        "devices": [{"index": index, **device} for index in range(2)],
        "infiniband": ["mlx5_0"],
        "backend": "nccl",
        "address": f"10.0.0.{number}",
        "interface": "eth0",
        "addresses": ["127.0.0.1", f"10.0.0.{number}"],
        "troubles": [],
    }


def _healthy(nodes: int = 3) -> Observed:
    """Nodes of two devices each: 300 GB/s within a node, 25 GB/s a device between two."""
    hosts = [f"node{number + 1}" for number in range(nodes)]
    seen = Observed(count=2 * nodes, address="node1:29500", limit=60.0, output_dir="/shared/run")
    seen.ranks = {rank: {"host": hosts[rank // 2], "local_rank": rank % 2} for rank in range(2 * nodes)}
    seen.nodes = {host: _facts(number + 1) for number, host in enumerate(hosts)}
    seen.mark = {"mark": ".seen", "made": []}
    met = {host: {"resolved": seen.nodes[host]["address"], "ahead": 0.001, "within": 0.002} for host in hosts}
    for host in hosts:
        others = copy.deepcopy({other: one for other, one in met.items() if other != host})
        seen.contact[host] = {"met": others, "folder": {"seen": True, "rate": GB}}
    nccl = {"network": "IB", "adapters": ["mlx5_0"], "ways": {"P2P": 8, "NET": 4}}
    seen.transports = {host: [copy.deepcopy(nccl) for _ in range(2)] for host in hosts}
    ranks = list(seen.ranks_of().values())
    for rounds, rate in ((bandwidth.inside(ranks), 300 * GB), (bandwidth.across(ranks), 25 * GB)):
        pairs = [way for pairs in rounds for pair in pairs for way in (pair, pair[::-1])]
        seen.links += [{"from": one, "to": other, "rate": rate} for one, other in pairs]
    return seen


def _slow_down(seen: Observed, rate: float, concerned: Callable[[int, int], bool]) -> None:
    for link in seen.links:
        if concerned(link["from"], link["to"]):
            link["rate"] = rate


def _found(seen: Observed, limits: Limits = LIMITS) -> list[tuple[str, str, str]]:
    return [(one.severity, one.check, one.where) for one in findings.find(seen, limits)]


def test_a_healthy_cluster_has_no_findings() -> None:
    """On any number of nodes, with floors and without; exit code 0."""
    for nodes in (1, 2, 3, 4):
        for limits in (LIMITS, Limits()):
            assert findings.find(_healthy(nodes), limits) == []
    assert report.exit_code([]) == 0


def _version(seen: Observed) -> None:
    seen.nodes["node3"]["versions"]["torch"] = "2.12.0"


def _no_nccl(seen: Observed) -> None:
    del seen.nodes["node2"]["versions"]["NCCL"]


def _shm_tiny(seen: Observed) -> None:
    seen.nodes["node2"]["shm"] = 60 << 20


def _shm_small(seen: Observed) -> None:
    seen.nodes["node2"]["shm"] = GB // 2


def _locked(seen: Observed) -> None:
    seen.nodes["node1"]["locked"] = 8 << 20


def _device_gone(seen: Observed) -> None:
    seen.nodes["node2"]["devices"].pop()


def _device_used(seen: Observed) -> None:
    seen.nodes["node2"]["devices"][1]["used"] = 30 * GB


def _other_device(seen: Observed) -> None:
    for device in seen.nodes["node2"]["devices"]:
        device["name"] = "NVIDIA A100-SXM4-80GB"


def _driver_broken(seen: Observed) -> None:
    seen.nodes["node2"] |= {"devices": [], "troubles": ["nvidia-smi: Unable to determine the device handle"]}


def _rank_absent(seen: Observed) -> None:
    seen.expected = ("node1", "node2", "node3")
    for rank in (4, 5):
        del seen.ranks[rank]
    del seen.nodes["node3"], seen.contact["node3"], seen.transports["node3"]
    seen.links = []


def _nobody_known(seen: Observed) -> None:
    _rank_absent(seen)
    seen.expected = ()


def _silent(seen: Observed) -> None:
    del seen.contact["node2"]


def _firewall(seen: Observed) -> None:
    for host in ("node1", "node3"):
        seen.contact[host]["met"]["node2"] = {"resolved": "10.0.0.2", "error": "timed out"}


def _one_way(seen: Observed) -> None:
    seen.contact["node1"]["met"]["node3"] = {"resolved": "10.0.0.3", "error": "Connection refused"}


def _loopback(seen: Observed) -> None:
    seen.nodes["node2"]["address"] = "127.0.1.1"
    for host in ("node1", "node3"):  # nobody gets there by it
        seen.contact[host]["met"]["node2"] = {"resolved": "10.0.0.2", "error": "node1 answers in its place"}


def _unresolved(seen: Observed) -> None:
    seen.contact["node1"]["met"]["node3"]["resolved"] = ""


def _leads_elsewhere(seen: Observed) -> None:
    seen.contact["node1"]["met"]["node3"]["resolved"] = "10.0.0.9"


def _clock(seen: Observed) -> None:
    seen.contact["node1"]["met"]["node3"]["ahead"] = -7.0


def _own_clock(seen: Observed) -> None:
    for met in seen.contact["node1"]["met"].values():
        met["ahead"] = -7.0


def _unshared(seen: Observed) -> None:
    seen.contact["node2"]["folder"] = {"seen": False}


def _unwritable(seen: Observed) -> None:
    seen.contact["node2"]["folder"] = {"seen": True, "error": "Permission denied"}


def _no_folder(seen: Observed) -> None:
    seen.mark = {"error": "Read-only file system", "made": []}
    for contact in seen.contact.values():
        contact["folder"] = None


def _slow_folder(seen: Observed) -> None:
    seen.contact["node2"]["folder"]["rate"] = 0.01 * GB


def _sockets(seen: Observed) -> None:
    seen.transports["node2"][0] |= {"network": "Socket", "adapters": ["eth0"]}


def _sockets_without_driver(seen: Observed) -> None:
    _sockets(seen)
    seen.nodes["node2"]["infiniband"] = []


def _by_the_host(seen: Observed) -> None:
    seen.transports["node2"][0]["ways"] = {"SHM": 8, "NET": 4}


def _slow_link(seen: Observed) -> None:
    _slow_down(seen, 2 * GB, lambda one, other: {one // 2, other // 2} == {0, 2})


def _slow_direction(seen: Observed) -> None:
    _slow_down(seen, 2 * GB, lambda one, other: (one // 2, other // 2) == (0, 2))


def _slow_node(seen: Observed) -> None:
    _slow_down(seen, 2 * GB, lambda one, other: one // 2 == 1 and other // 2 != 1)


def _slow_adapter(seen: Observed) -> None:
    _slow_down(seen, 2 * GB, lambda one, other: one // 2 != other // 2 and 3 in (one, other))


def _slow_inside(seen: Observed) -> None:
    _slow_down(seen, 20 * GB, lambda one, other: one // 2 == other // 2 == 1)


def _all_slow(seen: Observed) -> None:
    _slow_down(seen, 2 * GB, lambda one, other: one // 2 != other // 2)


def _unmeasured(seen: Observed) -> None:
    seen.failed = {2: "NCCL error: unhandled system error", 3: "NCCL error: unhandled system error"}


def _same_name(seen: Observed) -> None:
    seen.ranks[1]["local_rank"] = 0


TROUBLES = [
    (_version, ERROR, "versions", "node3"),
    (_no_nccl, ERROR, "versions", "node2"),
    (_shm_tiny, ERROR, "shared memory", "node2"),
    (_shm_small, WARNING, "shared memory", "node2"),
    (_locked, WARNING, "locked memory", "node1"),
    (_device_used, WARNING, "devices", "node2"),
    (_other_device, WARNING, "devices", "node2"),
    (_device_gone, ERROR, "devices", "node2"),
    (_driver_broken, ERROR, "devices", "node2"),
    (_rank_absent, ERROR, "present", "node3"),
    (_nobody_known, ERROR, "present", "ranks 4, 5"),
    (_silent, ERROR, "contact", "node2"),
    (_firewall, ERROR, "contact", "node2"),
    (_one_way, ERROR, "contact", "node1 and node3"),
    (_loopback, ERROR, "address", "node2"),
    (_unresolved, WARNING, "names", "node3"),
    (_leads_elsewhere, WARNING, "names", "node3"),
    (_clock, WARNING, "clocks", "node3"),
    (_own_clock, WARNING, "clocks", "node1"),
    (_unshared, ERROR, "output folder", "node2"),
    (_unwritable, ERROR, "output folder", "node2"),
    (_no_folder, ERROR, "output folder", "node1"),
    (_slow_folder, WARNING, "output folder", "node2"),
    (_sockets, ERROR, "transport", "node2"),
    (_sockets_without_driver, ERROR, "transport", "node2"),
    (_by_the_host, WARNING, "transport", "node2"),
    (_slow_link, WARNING, "bandwidth", "node1 and node3"),
    (_slow_direction, WARNING, "bandwidth", "node1 and node3"),
    (_slow_node, WARNING, "bandwidth", "node2"),
    (_slow_adapter, WARNING, "bandwidth", "device 1 of node2"),
    (_slow_inside, WARNING, "bandwidth", "node2"),
    (_all_slow, WARNING, "bandwidth", "all nodes"),
    (_unmeasured, ERROR, "bandwidth", "node2"),
    (_same_name, ERROR, "names", "node1"),
]


def _name(value: object) -> str:
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(("trouble", "severity", "check", "where"), TROUBLES, ids=_name)
def test_a_trouble_is_named_and_nothing_else(
    trouble: Callable[[Observed], None], severity: str, check: str, where: str
) -> None:
    """One finding, with its node; the line and the exit code follow from it."""
    seen = _healthy()
    trouble(seen)
    assert _found(seen) == [(severity, check, where)]
    found = findings.find(seen, LIMITS)
    assert report.exit_code(found) == (2 if severity == ERROR else 1)
    assert f"\n{severity}: {where}: " in report.screen(seen, found, "", quick=False, seconds=1.0)
    assert json.loads(json.dumps(report.record(seen, found, "")))["findings"][0]["where"] == where


def test_a_slow_link_is_seen_without_a_floor() -> None:
    """By the fastest one of its kind, also where two of three are slow; with two nodes only a floor can tell."""
    for trouble, where in (
        (_slow_link, "node1 and node3"),
        (_slow_node, "node2"),
        (_slow_adapter, "device 1 of node2"),
    ):
        seen = _healthy()
        trouble(seen)
        assert _found(seen, Limits()) == [(WARNING, "bandwidth", where)]
    two = _healthy(2)
    _all_slow(two)
    assert _found(two, Limits()) == []
    assert _found(two) == [(WARNING, "bandwidth", "node1 and node2")]


def test_blame_falls_on_what_slow_pairs_have_in_common() -> None:
    """Two bad members of five; a bad pair beside them; nobody where all pairs are bad."""
    pairs = {(a, b): False for a in "abcde" for b in "abcde" if a < b}
    bad = {pair for pair in pairs if set(pair) & set("ab")} | {("c", "d")}
    assert links.blame({pair: pair in bad for pair in pairs}) == (["a", "b"], [("c", "d")])
    assert links.blame(dict.fromkeys(pairs, True)) == ([], list(pairs))


@pytest.mark.parametrize("players", [1, 2, 3, 5, 8])
def test_everybody_meets_everybody_once(players: int) -> None:
    rounds = bandwidth.tournament(players)
    met = [pair for pairs in rounds for pair in pairs]
    assert sorted(met) == [(a, b) for a in range(players) for b in range(a + 1, players)]
    for pairs in rounds:
        playing = [player for pair in pairs for player in pair]
        assert len(playing) == len(set(playing))


def test_the_transport_is_read_off_the_log_of_nccl() -> None:
    """Lines as NCCL 2.2x writes them: the network, its adapters, the ways of the channels."""
    fallen_back = """\
node2:11:22 [0] NCCL INFO NET/IB : No device found.
node2:11:22 [0] NCCL INFO NET/Socket : Using [0]eth0:10.0.0.2<0> [1]eth1:10.1.0.2<0>
node2:11:22 [0] NCCL INFO Using network Socket
node2:11:22 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM/read
node2:11:22 [0] NCCL INFO Channel 00/0 : 3[1] -> 0[0] [receive] via NET/Socket/0
"""
    assert transport.read(fallen_back) == {
        "network": "Socket", "adapters": ["eth0", "eth1"], "ways": {"P2P": 1, "NET": 1},
    }  # fmt: skip
    well = """\
node2:11:22 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/RoCE [RO]; OOB eth0:10.0.0.2<0>
node2:11:22 [0] NCCL INFO Using network IB
"""
    assert transport.read(well) == {"network": "IB", "adapters": ["mlx5_0", "mlx5_1"], "ways": {}}
    assert transport.read("")["network"] == ""


def test_devices_are_those_that_the_process_may_use() -> None:
    """nvidia-smi's lines; memory that is shared with the host has no size; CUDA_VISIBLE_DEVICES."""
    text = "0, NVIDIA H100 80GB HBM3, 570.1, 81559, 4\n1, NVIDIA GB10, 570.1, [N/A], [N/A]\n"
    first, second = devices.parse(text)
    assert (first["total"], first["used"], second["total"]) == (81559 << 20, 4 << 20, None)
    assert devices.visible([first, second], "1") == [second]
    for chosen in (None, "GPU-5f1c"):
        assert devices.visible([first, second], chosen) == [first, second]


def test_an_adapter_without_a_driver_is_seen(tmp_path: Path) -> None:
    assert devices.infiniband(str(tmp_path)) == []
    on_bus = tmp_path / "bus/pci/devices/0000:3b:00.0"
    on_bus.mkdir(parents=True)
    (on_bus / "class").write_text("0x020700\n")
    assert devices.infiniband(str(tmp_path)) == ["0000:3b:00.0 without driver"]
    (tmp_path / "class/infiniband/mlx5_0").mkdir(parents=True)
    assert devices.infiniband(str(tmp_path)) == ["mlx5_0"]


def test_floors_are_those_of_the_planner_where_it_knows_the_device() -> None:
    """Half of what a plan assumes; none for other devices; what the user gives goes first."""
    seen = _healthy()
    limits = planned.link_limits(seen, None, 3.0, 0.05)
    assert (limits.inside, limits.across) == (225 * GB, 3 * GB)
    for facts in seen.nodes.values():
        for device in facts["devices"]:
            device["name"] = "NVIDIA GeForce RTX 4090"
    assert planned.link_limits(seen, None, None, 0.05).inside is None


def test_a_device_without_room_for_the_model_is_named() -> None:
    """By the planner's peak for it; a model that fits nowhere is said to."""
    seen = _healthy()
    said, found = planned.memory(seen, "1B")
    assert said.startswith("1B: ")
    assert found == []
    seen.nodes["node2"]["devices"][1]["used"] = 84 * GB
    (unfit,) = planned.memory(seen, "1B")[1]
    assert (unfit.severity, unfit.where) == (ERROR, "node2")
    assert "device 1 has 1.0 GB free" in unfit.found


def test_what_hangs_is_left_behind() -> None:
    """Within the limit, as an error that says what it was; other errors and values pass."""
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"reading /dead has not ended within 0\.1 s"):
        within(0.1, lambda: time.sleep(5), "reading /dead")
    assert time.monotonic() - began < 4
    assert within(5, lambda: 3, "counting") == 3
    with pytest.raises(PermissionError):
        within(5, lambda: (_ for _ in ()).throw(PermissionError()), "asking")


def test_a_rank_that_does_not_come_does_not_hold_up_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 goes on after the limit of the meeting, names the rank, and measures nothing without it."""
    port = str(free_port())
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in {**variables, "LIFT_DS_MEETING_SECONDS": "1"}.items():
        monkeypatch.setenv(name, value)
    seen: list[Observed] = []

    def judge(observed: Observed) -> int:
        seen.append(observed)
        return report.exit_code(findings.find(observed, Limits()))

    assert examination.examine(join(), Settings(), judge) == 2
    (found,) = [one for one in findings.find(seen[0], Limits()) if one.check != "shared memory"]
    assert (found.check, found.where) == ("present", "rank 1")
    assert seen[0].unmeasured == "not all ranks have come"


def test_a_rank_without_rank_0_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the limit, with the address and the reason."""
    port = str(free_port())
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in {**variables, "LIFT_DS_MEETING_SECONDS": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=rf"rank 1 on \S+ does not reach rank 0 at 127\.0\.0\.1:{port} .* refused"):
        join()


def test_only_what_has_come_is_collected() -> None:
    """A rank that says nothing in a later step is left out after its limit."""
    store = dist.HashStore()
    first, second = (Meeting(store, rank, 3, "", 1.0) for rank in (0, 1))
    first.give("contact", {"met": {}})
    second.give("contact", {"met": {"node1": 1}})
    assert first.collect("contact", range(3), 0.2) == {0: {"met": {}}, 1: {"met": {"node1": 1}}}


def test_two_processes_of_this_machine(tmp_path: Path) -> None:
    """The command itself, by gloo: rank 0 alone speaks, the link is measured both ways, nothing is left behind."""
    record = tmp_path / "record.json"
    flags = ["--processes", "2", "--output-dir", str(tmp_path / "new" / "run"), "--json", str(record)]
    ended = subprocess.run(
        [sys.executable, "-m", "lift_ds.doctor", *flags, "--min-write", "1e-6"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    content = json.loads(record.read_text())
    assert [one for one in content["findings"] if one["check"] != "shared memory"] == []
    assert ended.returncode == content["exit_code"], ended.stderr
    assert sorted((link["from"], link["to"]) for link in content["links"]) == [(0, 1), (1, 0)]
    assert all(link["rate"] > 1e6 for link in content["links"])
    assert ended.stdout.count("lift-ds doctor: ") == 1
    assert "bandwidth   between ranks of a node" in ended.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]
