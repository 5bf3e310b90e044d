"""From rates between pairs to what is slow: a node, a device, or the link between two."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

#: A link is slow below this share of the fastest of its kind. Links of one kind differ by less; a link that has fallen
#: back to another transport or rate differs by more.
SHARE = 1 / 3

Pair = tuple[str, str]


@dataclass(frozen=True)
class Slow:
    """What is slow.

    Args:
        where: a node, "node1 and node2", or all of a kind.
        rate: bytes a second: of the slowest link of it.
    """

    where: str
    rate: float


@dataclass(frozen=True)
class Rates:
    """Bytes a second of each link, the slower direction of the two.

    Args:
        inside: host -> pair of its ranks -> rate.
        across: pair of hosts -> number of the device on both -> rate.
    """

    inside: dict[str, dict[Pair, float]]
    across: dict[Pair, dict[int, float]]

    def between_nodes(self) -> dict[Pair, float]:
        """Return pair of hosts -> rate of all its devices together."""
        return {pair: sum(rates.values()) for pair, rates in self.across.items()}

    def all_inside(self) -> list[float]:
        """Return the rates of all links within nodes."""
        return [rate for rates in self.inside.values() for rate in rates.values()]


def rates(links: Iterable[Mapping[str, Any]], ranks_of: Mapping[str, list[int]]) -> Rates:
    """Sort what was measured.

    Args:
        links: "from", "to" and "rate".
        ranks_of: host -> its ranks.
    """
    place = {rank: (host, number) for host, ranks in ranks_of.items() for number, rank in enumerate(ranks)}
    order = list(ranks_of)
    found = Rates({}, {})
    for link in links:
        low, high = sorted((link["from"], link["to"]))
        (host, number), (other, _) = place[low], place[high]
        if host == other:
            of_host = found.inside.setdefault(host, {})
            pair = (f"rank {low}", f"rank {high}")
            of_host[pair] = min(of_host.get(pair, link["rate"]), link["rate"])
        else:
            hosts = (host, other) if order.index(host) < order.index(other) else (other, host)
            of_pair = found.across.setdefault(hosts, {})
            of_pair[number] = min(of_pair.get(number, link["rate"]), link["rate"])
    return found


def blame(pairs: Mapping[Pair, bool]) -> tuple[list[str], list[Pair]]:
    """Tell what is common to the pairs that are bad.

    A member is to blame where all its pairs are bad, and it has at least two. Where all pairs of all are bad, or there
    is only one, no member stands out.

    Args:
        pairs: of members -> whether it is bad.

    Returns:
        The members to blame; the bad pairs without any of them.
    """
    members = sorted({member for pair in pairs for member in pair})
    bad = [pair for pair, is_bad in pairs.items() if is_bad]
    guilty = []
    if len(bad) < len(pairs):
        for member in members:
            of_member = [is_bad for pair, is_bad in pairs.items() if member in pair]
            if len(of_member) > 1 and all(of_member):
                guilty.append(member)
    return guilty, [pair for pair in bad if not set(pair) & set(guilty)]


def slow_inside(found: Rates, floor: float | None) -> list[Slow]:
    """Return what is slow within nodes.

    Args:
        found: the rates.
        floor: bytes a second that every link has to reach; None for none.
    """
    limit = _limit(found.all_inside(), floor)
    slow = []
    for host, of_host in found.inside.items():
        bad = {pair: rate < limit for pair, rate in of_host.items()}
        if all(bad.values()):
            slow.append(Slow(host, min(of_host.values())))
            continue
        guilty, pairs = blame(bad)
        slow += [
            Slow(f"{host}, {rank}", min(rate for pair, rate in of_host.items() if rank in pair)) for rank in guilty
        ]
        slow += [Slow(f"{host}, {pair[0]} and {pair[1]}", of_host[pair]) for pair in pairs]
    return slow


def slow_across(found: Rates, floor: float | None) -> list[Slow]:
    """Return what is slow between nodes.

    Args:
        found: the rates.
        floor: bytes a second that each pair of nodes has to reach, all their devices together; None for none.
    """
    whole = found.between_nodes()
    limit = _limit([rate for of_pair in found.across.values() for rate in of_pair.values()], None)
    under = {pair: floor is not None and rate < floor for pair, rate in whole.items()}
    slow_devices = {
        pair: {number for number, rate in of_pair.items() if under[pair] or rate < limit}
        for pair, of_pair in found.across.items()
    }
    wholly = {pair: len(slow_devices[pair]) == len(of_pair) for pair, of_pair in found.across.items()}
    if len(whole) > 1 and all(wholly.values()):
        return [Slow("all nodes", min(whole.values()))]
    guilty, pairs = blame(wholly)
    slow = [Slow(host, min(rate for pair, rate in whole.items() if host in pair)) for host in guilty]
    slow += [Slow(f"{pair[0]} and {pair[1]}", whole[pair]) for pair in pairs]
    for number in sorted({number for numbers in slow_devices.values() for number in numbers}):
        partly = {pair: number in slow_devices[pair] for pair in whole if not wholly[pair]}
        hosts, rest = blame(partly)
        slow += [Slow(f"device {number} of {host}", _least(found, number, host)) for host in hosts]
        slow += [Slow(f"devices {number} of {a} and {b}", found.across[a, b][number]) for a, b in rest]
    return slow


def _least(found: Rates, number: int, host: str) -> float:
    return min(of_pair[number] for pair, of_pair in found.across.items() if host in pair)


def _limit(known: list[float], floor: float | None) -> float:
    return max(floor or 0.0, SHARE * max(known, default=0.0))
