"""From what was found out of all nodes to what is wrong with them. Pure: nothing is asked of any node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lift_ds.doctor import links
from lift_ds.doctor.examination import Observed
from lift_ds.doctor.transport import SOCKET

#: Severities: a job would fail, or compute something else; a job would be slow, or may fail.
ERROR, WARNING = "error", "warning"

#: Free bytes of /dev/shm: NVIDIA's manual of NCCL asks for 1 GB in containers; Docker gives 64 MiB, and NCCL, gloo and
#: loaders of data then fail.
SHM_WANTED, SHM_NEEDED = 10**9, 64 << 20

#: Seconds that clocks may be apart: times in logs and of files are compared between nodes.
CLOCKS = 1.0

#: Used bytes of a device from which somebody else is on it; the driver alone takes less.
IN_USE = 2 * 10**9


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Args:
        severity: ERROR or WARNING.
        check: which check has found it.
        where: the node, or whatever else is to blame.
        found: what was found.
        advice: what to do.
    """

    severity: str
    check: str
    where: str
    found: str
    advice: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.where}: {self.found}; {self.advice}"


@dataclass(frozen=True)
class Limits:
    """What is asked of a cluster, in bytes a second; None for nothing.

    Args:
        inside: of each link within a node.
        across: of each pair of nodes, all their devices together.
        write: of the output folder.
        planned: where the limits of the links come from, for the advice; "" where the user gave them.
    """

    inside: float | None = None
    across: float | None = None
    write: float | None = None
    planned: str = ""


def find(seen: Observed, limits: Limits) -> list[Finding]:
    """Return all that is wrong, errors first.

    Args:
        seen: what was found out.
        limits: what is asked of it.
    """
    found = [
        *absent(seen), *names(seen), *versions(seen.nodes), *memory_of_hosts(seen.nodes), *devices(seen),
        *contacts(seen), *clocks(seen), *output_folder(seen, limits), *transports(seen), *bandwidth(seen, limits),
    ]  # fmt: skip
    return sorted(found, key=lambda finding: finding.severity != ERROR)


def absent(seen: Observed) -> Iterator[Finding]:
    """Ranks that have not come, by the node they were expected from."""
    missing = seen.absent()
    if not missing:
        return
    each = seen.count // len(seen.expected) if seen.expected else 0
    by_host: dict[str, list[int]] = {}
    for rank in missing:
        host = seen.expected[rank // each] if each and rank // each < len(seen.expected) else ""
        by_host.setdefault(host, []).append(rank)
    advice = "is the node up, is the command started there, and does a firewall let it through?"
    for host, ranks in by_host.items():
        text = f"not come to {seen.address} within {seen.limit:g} s"
        if not host:  # who they are is not known, but who they are not
            text += f"; there are {some(seen.nodes)}"
        yield Finding(ERROR, "present", host or _plural("rank", ranks), text, advice)


def names(seen: Observed) -> Iterator[Finding]:
    """Hosts that several nodes have the name of."""
    first = Counter(who["host"] for who in seen.ranks.values() if who["local_rank"] == 0)
    for host, count in first.items():
        if count > 1:
            text = f"{count} processes are the first rank of a host of this name"
            yield Finding(ERROR, "names", host, text, "give each node a name of its own, and each rank its LOCAL_RANK")


def versions(nodes: Mapping[str, dict[str, Any]]) -> Iterator[Finding]:
    """Versions that differ between nodes; the fewer are named."""
    for name in dict.fromkeys(name for facts in nodes.values() for name in facts["versions"]):
        of_host = {host: facts["versions"].get(name, "none") for host, facts in nodes.items()}
        usual = Counter(of_host.values()).most_common(1)[0][0]
        different: dict[str, list[str]] = {}
        for host, version in of_host.items():
            if version != usual:
                different.setdefault(version, []).append(host)
        for version, hosts in different.items():
            others = [host for host, has in of_host.items() if has == usual]
            text = f"{name} is {version}, and {usual} on {some(others)}"
            yield Finding(
                ERROR, "versions", some(hosts), text, "use one environment on all nodes (VENV on shared storage)"
            )


def memory_of_hosts(nodes: Mapping[str, dict[str, Any]]) -> Iterator[Finding]:
    """/dev/shm that is small, and locked memory that is limited."""
    for host, facts in nodes.items():
        free = facts["shm"]
        if free is None or free < SHM_WANTED:
            text = (
                "there is no /dev/shm"
                if free is None
                else f"/dev/shm has {_gb(free)} GB free of {_gb(SHM_WANTED)} wanted"
            )
            severity = ERROR if free is None or free < SHM_NEEDED else WARNING
            advice = (
                "enlarge it: mount -o remount,size=4G /dev/shm; in a container --shm-size=4g; remove old files in it"
            )
            yield Finding(severity, "shared memory", host, text, advice)
        limited = facts["locked"] is not None and (facts["devices"] or facts["infiniband"])
        if limited:
            text = f"only {_gb(facts['locked'])} GB may be locked in memory, which network adapters and GPUs need"
            advice = "ulimit -l unlimited, for the service that starts the job too; in a container --ulimit memlock=-1"
            yield Finding(WARNING, "locked memory", host, text, advice)


def devices(seen: Observed) -> Iterator[Finding]:
    """Devices that are missing, differ or are in use, and probes that have failed."""
    counts = {host: len(facts["devices"]) for host, facts in seen.nodes.items()}
    most = max(counts.values(), default=0)
    for host, facts in seen.nodes.items():
        for trouble in facts["troubles"]:
            yield Finding(ERROR, "devices", host, trouble, "look after the driver of this node: dmesg, nvidia-smi -q")
        if counts[host] < most and not facts["troubles"]:
            text = f"{counts[host]} devices, and {most} on {some([h for h in counts if counts[h] == most])}"
            yield Finding(
                ERROR, "devices", host, text, "nvidia-smi there; a device that has failed needs a reset or a repair"
            )
        ranks = len(seen.ranks_of().get(host, ()))
        if counts[host] == most and 0 < most < ranks:
            advice = "start as many ranks as devices: GPUS_PER_NODE, slots="
            yield Finding(ERROR, "devices", host, f"{ranks} ranks on {most} devices", advice)
        for device in facts["devices"]:
            if device["used"] is not None and device["used"] > IN_USE:
                text = f"device {device['index']} has {_gb(device['used'])} of {_gb(device['total'])} GB in use already"
                yield Finding(
                    WARNING, "devices", host, text, "end what runs there (nvidia-smi names it), or take another node"
                )
    kinds = {host: sorted({device["name"] for device in facts["devices"]}) for host, facts in seen.nodes.items()}
    usual = Counter(map(tuple, kinds.values())).most_common(1)
    for host, kind in kinds.items():
        if counts[host] == most and tuple(kind) != usual[0][0]:
            text = f"devices are {some(kind)}, and {some(usual[0][0])} elsewhere"
            yield Finding(WARNING, "devices", host, text, "the slowest sets the pace; take nodes of one kind")


def contacts(seen: Observed) -> Iterator[Finding]:
    """Nodes that do not reach each other, names that lead elsewhere, addresses that are of no use to others."""
    if len(seen.nodes) < 2:
        return
    useless = [
        host for host, facts in seen.nodes.items() if not facts["address"] or facts["address"].startswith("127.")
    ]
    for host in useless:
        text = f"the others would be given the address {seen.nodes[host]['address'] or '(none)'} for it"
        advice = (
            "export GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME with the name of its interface, or correct /etc/hosts"
        )
        yield Finding(ERROR, "address", host, text, advice)
    for host in seen.nodes:
        if host not in seen.contact:
            text = "it has come, and has then not said whether it reaches the others"
            yield Finding(ERROR, "contact", host, text, "look into the log of its ranks")
    reached = {
        (one, other): "error" not in met
        for one, contact in seen.contact.items()
        for other, met in contact["met"].items()
        if other not in useless
    }
    yield from _unreached(seen, reached)
    yield from _names_of_others(seen)


def _unreached(seen: Observed, reached: Mapping[tuple[str, str], bool]) -> Iterator[Finding]:
    pairs: dict[tuple[str, str], bool] = {}
    for (one, other), well in reached.items():
        pair = (min(one, other), max(one, other))
        pairs[pair] = pairs.get(pair, False) or not well
    guilty, rest = links.blame(pairs)
    advice = "open all TCP ports between the nodes (only the port of the meeting is not enough), in both directions"
    for host in guilty:
        to, from_ = ([pair for pair, well in reached.items() if not well and pair[end] == host] for end in (1, 0))
        parts = [f"it is not reached by {some(one for one, _ in to)}"] if to else []
        parts += [f"it does not reach {some(other for _, other in from_)}"] if from_ else []
        yield Finding(ERROR, "contact", host, f"{' and '.join(parts)}: {_why(seen, [*to, *from_])}", advice)
    for pair in rest:
        bad = [way for way in (pair, pair[::-1]) if reached.get(way) is False]
        ways = " and ".join(f"{one} does not reach {other}" for one, other in bad)
        yield Finding(ERROR, "contact", f"{pair[0]} and {pair[1]}", f"{ways}: {_why(seen, bad)}", advice)


def _why(seen: Observed, ways: Iterable[tuple[str, ...]]) -> str:
    return ", ".join(sorted({seen.contact[one]["met"][other]["error"] for one, other in ways}))


def _names_of_others(seen: Observed) -> Iterator[Finding]:
    for host, facts in seen.nodes.items():
        unknown, elsewhere = [], {}
        for one, contact in seen.contact.items():
            address = contact["met"].get(host, {}).get("resolved")
            if address == "":
                unknown.append(one)
            elif address is not None and address not in facts["addresses"]:
                elsewhere[one] = address
        advice = "enter it in DNS or /etc/hosts; launchers and logs use names"
        if unknown:
            yield Finding(WARNING, "names", host, f"its name is not known on {some(unknown)}", advice)
        if elsewhere:
            text = f"its name leads to {some(set(elsewhere.values()))} on {some(elsewhere)}, no address of its own"
            yield Finding(WARNING, "names", host, text, advice)


def clocks(seen: Observed) -> Iterator[Finding]:
    """Clocks that are far from those of most nodes."""
    if not seen.contact:
        return
    ahead = ahead_of_middle(seen)
    for host, seconds in ahead.items():
        if abs(seconds) > CLOCKS:
            text = f"its clock is {abs(seconds):.1f} s {'ahead' if seconds > 0 else 'behind'}"
            yield Finding(WARNING, "clocks", host, text, "synchronise it: chronyc tracking, timedatectl")


def ahead_of_middle(seen: Observed) -> dict[str, float]:
    """Return host -> seconds that its clock is ahead of the middle one, as far as the first node has asked it."""
    first = next(iter(seen.contact))
    met = seen.contact[first]["met"]
    ahead = {first: 0.0} | {host: one["ahead"] for host, one in met.items() if "ahead" in one}
    middle = sorted(ahead.values())[(len(ahead) - 1) // 2]
    # What is within the error of the question is no difference.
    return {
        host: 0.0 if abs(seconds - middle) <= met.get(host, {}).get("within", 0.0) else seconds - middle
        for host, seconds in ahead.items()
    }


def output_folder(seen: Observed, limits: Limits) -> Iterator[Finding]:
    """An output folder that is another one on some nodes, cannot be written to, or is slow."""
    if seen.mark is None:
        return
    name = f"--output-dir {seen.output_dir!r}"
    if "error" in seen.mark:
        where = next((who["host"] for rank, who in seen.ranks.items() if rank == 0), "rank 0")
        yield Finding(
            ERROR, "output folder", where, f"{name}: {seen.mark['error']}", "name a folder that can be written to"
        )
        return
    for host, contact in seen.contact.items():
        looked = contact["folder"]
        if not looked["seen"]:
            text = f"{name} is not the same folder on all nodes: what rank 0 wrote is not seen on {host}"
            yield Finding(
                ERROR, "output folder", host, text, "mount it there, or name one on storage that all nodes share"
            )
        elif "error" in looked:
            yield Finding(ERROR, "output folder", host, f"{name}: {looked['error']}", "let this node write to it")
        elif looked["rate"] is not None and limits.write is not None and looked["rate"] < limits.write:
            text = f"{name} takes {_gb(looked['rate'])} GB/s, where {_gb(limits.write)} are asked for (--min-write)"
            yield Finding(WARNING, "output folder", host, text, "checkpoints will be slow; name faster storage")


def transports(seen: Observed) -> Iterator[Finding]:
    """Nodes where NCCL has fallen back to sockets, or goes another way than on the others within a node."""
    if not seen.transports:
        return
    networks = {host: sorted({one["network"] for one in of_ranks}) for host, of_ranks in seen.transports.items()}
    faster = {name for names in networks.values() for name in names} - {SOCKET, ""}
    for host, names_ in networks.items():
        adapters = seen.nodes[host]["infiniband"]
        if len(seen.nodes) > 1 and SOCKET in names_ and (adapters or faster):
            instead = f"this node has {some(adapters)}" if adapters else f"other nodes take {some(faster)}"
            used = sorted({name for one in seen.transports[host] for name in one["adapters"]})
            text = f"NCCL sends over TCP sockets ({some(used)}), although {instead}"
            advice = (
                "see ibstat, NCCL_IB_HCA and NCCL_IB_DISABLE; in a container pass /dev/infiniband on; in a cloud "
                "load its plugin of NCCL"
            )
            yield Finding(ERROR, "transport", host, text, advice)
    direct = {host: all("SHM" not in one["ways"] for one in of_ranks) for host, of_ranks in seen.transports.items()}
    if any(direct.values()):
        for host in (host for host, well in direct.items() if not well):
            text = "its devices exchange through the memory of the host (SHM), and directly on other nodes"
            yield Finding(
                WARNING, "transport", host, text, "see nvidia-smi topo -p2p r, NCCL_P2P_DISABLE, ACS of its PCI bus"
            )


def bandwidth(seen: Observed, limits: Limits) -> Iterator[Finding]:
    """Links that are slow, or could not be measured."""
    ranks_of = seen.ranks_of()
    by_error: dict[str, list[int]] = {}
    for rank, error in seen.failed.items():
        by_error.setdefault(error, []).append(rank)
    for error, ranks in by_error.items():
        hosts = [host for host, of_host in ranks_of.items() if set(of_host) & set(ranks)]
        text = f"{_plural('rank', ranks)} could not measure the links: {error}"
        yield Finding(ERROR, "bandwidth", some(hosts), text, "a collective of the job would fail in the same way")
    if seen.failed:  # those that did measure may have waited for them
        return
    found = links.rates(seen.links, ranks_of)
    for slow in links.slow_inside(found, limits.inside):
        yield _slow(slow, "ranks of a node", max(found.all_inside()), limits.inside, "--intra-node", limits.planned)
    for slow in links.slow_across(found, limits.across):
        fastest = max(found.between_nodes().values())
        yield _slow(slow, "nodes", fastest, limits.across, "--inter-node", limits.planned)


def _slow(slow: links.Slow, what: str, fastest: float, floor: float | None, option: str, planned: str) -> Finding:
    beside = f"the fastest link between {what} has {_gb(fastest)}"
    if floor is not None and slow.rate < floor:
        beside = f"{_gb(floor)} between {what} are asked for ({planned or option.replace('--', '--min-')})"
    text = f"{_gb(slow.rate)} GB/s, where {beside}"
    advice = f"see its cable, port and adapter, or plan with it: lift-ds plan {option} {_gb(slow.rate)}"
    return Finding(WARNING, "bandwidth", slow.where, text, advice)


def _plural(noun: str, numbers: list[int]) -> str:
    return f"{noun}{'s' if len(numbers) > 1 else ''} {some(map(str, numbers))}"


def some(words: Iterable[str], most: int = 8) -> str:
    """Return words with commas between them, and how many are left out.

    Args:
        words: all of them.
        most: how many to name.
    """
    words = list(words)
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def _gb(count: float) -> str:
    return f"{count / 1e9:.3g}"
