"""Llama-2-70B on 64 ranks without its weights: the code that attaches, deals a refresh out and shards the index, run on
meta tensors, gives what the planner says, balanced, and within every budget of the design.

torch's fake process group stands for the other 63 ranks: what is looked at is what this rank would hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from lift_ds import LiftConfig
from lift_ds.model.first_selection import FrozenWeight, deal_first
from lift_ds.model.weights import principal_weights
from lift_ds.planner.configuration import read_content, settings_of
from lift_ds.planner.estimate import Choice, setting_for
from lift_ds.planner.formulas import (
    GRADIENTS,
    INDEX,
    MASTER,
    MOMENTS,
    TRAINED,
    WEIGHTS,
    Setting,
    network_step,
    persistent,
)
from lift_ds.planner.models import ModelFacts, build_on_meta, facts_of
from lift_ds.planner.refresh_work import refresh_work
from lift_ds.refresh.schedule import plan_refresh
from lift_ds.selection import MatrixSize, selection_cost
from lift_ds.zero.sharded_index import ShardedIndex

RANKS = 64
CONFIG = LiftConfig(budget_rank=128)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build_on_meta(settings_of(*read_content("70B")), CONFIG)


@pytest.fixture(scope="module")
def facts(model: nn.Module) -> ModelFacts:
    return facts_of("70B", settings_of(*read_content("70B")), model)


@pytest.fixture(params=[0, 17, 63])
def rank(request: pytest.FixtureRequest) -> Iterator[int]:
    dist.init_process_group("fake", rank=request.param, world_size=RANKS, store=FakeStore())
    deepspeed.init_distributed("fake", auto_mpi_discovery=False, verbose=False)
    yield request.param
    dist.destroy_process_group()
    deepspeed.comm.comm.cdb = None


def test_nothing_is_allocated(model: nn.Module) -> None:
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(1 for _ in principal_weights(model)) == 560


def test_the_sharded_index_of_a_rank_is_what_the_planner_says(rank: int, facts: ModelFacts) -> None:
    own = build_on_meta(settings_of(*read_content("70B")), CONFIG)  # sharding empties it
    sharded = ShardedIndex({name: layer.principal.index for name, layer in principal_weights(own)}, None, lambda: False)
    held = sum(shard.nbytes for shard in sharded._shards.values())
    expected = persistent(setting_for(facts, CONFIG, Choice("lift", 2, False, 1, 1, True, 2048), RANKS))
    assert held == expected[INDEX]


def test_shards_of_zero3_are_what_the_planner_says(model: nn.Module, facts: ModelFacts) -> None:
    # DeepSpeed gives every rank an equal part of each parameter, the last one padded.
    def part(parameters: list[torch.Tensor]) -> int:
        return sum(-(-p.numel() // RANKS) * p.element_size() for p in parameters)

    layers = [layer for _, layer in principal_weights(model)]
    found = persistent(setting_for(facts, CONFIG, Choice("lift", 3, False, 1, 1, True, 2048), RANKS))
    assert part([layer.weight for layer in layers]) == found[WEIGHTS]
    assert part([layer.principal_values for layer in layers]) == found[TRAINED] == found[GRADIENTS]
    assert part([layer.principal.index.words for layer in layers]) == found[INDEX]
    assert found[MASTER] + found[MOMENTS] == 6 * found[TRAINED]


@pytest.mark.parametrize("stage", [2, 3])
def test_a_refresh_is_dealt_out_evenly(stage: int, facts: ModelFacts) -> None:
    sizes = {name: MatrixSize.of(shape, 2) for name, shape in facts.shapes.items()}
    plan = plan_refresh(sizes, CONFIG, RANKS, collected=stage == 3, device_type="cuda")
    cost = {
        name: selection_cost(*shape, CONFIG.lra_rank, plan.settings[name].solver)
        for name, shape in facts.shapes.items()
    }
    jobs = [plan.jobs_of(rank) for rank in range(RANKS)]
    assert sorted(name for own in jobs for name in own) == sorted(facts.shapes)
    loads = [sum(cost[name] for name in own) for own in jobs]
    mean = sum(loads) / RANKS
    assert max(loads) <= mean + max(cost.values())
    assert max(loads) <= 1.25 * mean  # 240 of the 560 matrices are far larger than the rest: 3.75 a rank
    found = refresh_work(facts, CONFIG, RANKS, stage)
    assert found.operations == loads
    assert found.imbalance == pytest.approx(max(loads) / mean)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_budgets(stage: int, facts: ModelFacts) -> None:
    # Bytes per managed parameter, for a density of up to 5%; this one is 2.4%.
    def setting(method: str) -> Setting:
        return setting_for(facts, CONFIG, Choice(method, stage, False, 1, 1, False, 2048), RANKS)

    def held(method: str) -> dict[str, float]:
        return {name: size / facts.managed for name, size in persistent(setting(method)).items()}

    def sent(method: str) -> float:
        return sum(network_step(setting(method)).values())

    lift, lora = held("lift"), held("lora")
    assert lift[INDEX] <= 0.12 / RANKS
    assert lift[MASTER] + lift[MOMENTS] <= 0.6 / RANKS
    assert sum(lift.values()) - sum(lora.values()) <= 0.15 / RANKS
    assert sent("lift") <= (0.75 if stage == 3 else 1 / 12) * sent("full")


def test_the_first_selection_is_dealt_out_evenly(model: nn.Module) -> None:
    weights = {name: FrozenWeight(weight.weight, weight.layout) for name, weight in principal_weights(model)}
    jobs = deal_first(weights, CONFIG, RANKS)
    assert sorted(name for names in jobs for name in names) == sorted(weights)
    assert max(map(len, jobs)) <= math.ceil(560 / RANKS) + 1 == 10
