"""Pins that frozen weights within nodes change where they lie and nothing else: the same losses, indices and weights to
the bit, on four ranks of which two each act as a node; checkpoints that go with either placement.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks

from lift_ds.zero.node_shards import fitting, ranks_of_nodes

Results = dict[str, Any]


@pytest.fixture(scope="module", params=["few", pytest.param("every", marks=pytest.mark.slow)])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    return run_ranks("nodes", 4, tmp_path_factory.mktemp("nodes"), request.param)


def test_runs_are_those_of_the_other_placement_to_the_bit(ranks: list[Results]) -> None:
    """In what was changed since the beginning, and what was there before it, too."""
    for rank in ranks:
        for name, found in rank.items():
            expected = rank[f"{name.split()[0]} all"]
            assert found["losses"] == expected["losses"], name
            assert found["base loss"] == expected["base loss"] != found["losses"][-1], name
            for what in ("weights", "indices", "base"):
                assert found[what].keys() == expected[what].keys()
                assert all(torch.equal(found[what][key], expected[what][key]) for key in expected[what]), (name, what)
            for key, (indices, values) in expected["changed"].items():
                assert torch.equal(found["changed"][key][1], values), (name, key)
                assert indices is None or torch.equal(found["changed"][key][0], indices), (name, key)


def test_a_rank_holds_its_part_of_a_copy_for_two_ranks(ranks: list[Results]) -> None:
    """Frozen parameters and indices: twice as much as of one copy for four, up to padding."""
    for rank in ranks:
        for name, found in rank.items():
            if name.endswith(" 2"):
                once = rank[f"{name.split()[0]} all"]["held"]
                assert found["held"] == pytest.approx((1 if name.endswith("all") else 2) * once, rel=0.01), name
                assert found["held"] > found["managed"] / 2


def test_a_checkpoint_has_one_copy_and_gives_the_plain_model(ranks: list[Results]) -> None:
    for rank in ranks:
        runs = [found for name, found in rank.items() if "plain" in found]
        assert all(found["plain"] for found in runs)
        assert max(found["files"] for found in runs) < 1.1 * min(found["files"] for found in runs)


@pytest.mark.slow
def test_two_nodes_then_one_then_three(tmp_path: Path) -> None:
    """Of two ranks each, through universal checkpoints, the first right after a refresh: as one run on one copy."""
    whole = run_ranks("nodes", 4, tmp_path, "piece", "all", "0", "9", "", "")[0]
    pieces = [
        run_ranks("nodes", ranks, tmp_path, "piece", "2", *steps)[0]
        for ranks, *steps in (
            (4, "0", "3", "", "two"),
            (2, "3", "5", "two_universal", "one"),
            (6, "5", "9", "one_universal", ""),
        )
    ]
    # Gradients are summed over other numbers of ranks, in float32.
    assert [loss for found in pieces for loss in found["losses"]] == pytest.approx(whole["losses"], rel=1e-6)
    for key, index in whole["indices"].items():
        assert torch.equal(pieces[-1]["indices"][key], index), key
    for key, weight in whole["weights"].items():
        torch.testing.assert_close(pieces[-1]["weights"][key], weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("setting", "hosts", "nodes"),
    [
        ("node", "aabb", [[0, 1], [2, 3]]),
        ("node", "abab", [[0, 2], [1, 3]]),
        ("node", "aaaa", [[0, 1, 2, 3]]),
        ("2", "aaaa", [[0, 1], [2, 3]]),
    ],
)
def test_ranks_share_a_copy_by_their_hosts_or_by_number(setting: str, hosts: str, nodes: list[list[int]]) -> None:
    assert ranks_of_nodes(setting, [*hosts]) == nodes


@pytest.mark.parametrize(
    ("hosts", "memory", "size", "placement"),
    [
        ("aabb", [80, 80, 80, 80], 80, "node"),
        ("aabb", [80, 80, 80, 79], 80, "all"),  # half of the smallest is less than half a copy
        ("aabb", [80, 80, 80, 80], 81, "all"),
        ("aaaa", [80, 80, 80, 80], 8, "all"),  # one node
        ("aab", [80, 80, 80], 8, "all"),  # nodes of other sizes
    ],
)
def test_by_default_nodes_have_copies_that_take_half_a_device_at_most(
    hosts: str, memory: list[int], size: int, placement: str
) -> None:
    assert fitting([*hosts], memory, size) == placement


def test_nodes_of_other_sizes_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"frozen_weights='node' needs as many ranks on each node; there are a: 2, b: 1"
    ):
        ranks_of_nodes("node", [*"aab"])
    with pytest.raises(ValueError, match=r"frozen_weights='4': 6 ranks are no multiple of it"):
        ranks_of_nodes("4", [*"aaabbb"])
