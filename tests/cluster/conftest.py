"""Three hosts with SLURM, a small model and its data: one of each for all tests of this folder."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from cluster import Cluster, why_not
from given import Given

from lift_ds.training.demo import texts
from lift_ds.training.demo.base import BaseSettings, build_base


@pytest.fixture(scope="session")
def _hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), 3)
    yield cluster
    cluster.down()


@pytest.fixture
def cluster(_hosts: Cluster) -> Iterator[Cluster]:
    """The hosts; no test may leave a process on any of them."""
    yield _hosts
    left = _hosts.left()
    assert not left, f"left behind on the nodes:\n{left}"


@pytest.fixture(scope="session")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    folder = tmp_path_factory.mktemp("given")
    (folder / "base").mkdir()
    small = {"layers": 2, "heads": 4, "intermediate_size": 96, "vocab_size": 400, "steps": 2, "batch_size": 2}
    build_base(folder / "base", BaseSettings(hidden_size=64, stories=200, problems=40, held_out=4, **small))
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in texts.problems(64, 5)))
    return Given(folder / "base", rows)
