"""Pins that the planner plans what runs: bytes held and sent by one rank of an engine, and its refresh, equal the plan.

Real engines of DeepSpeed over small real models. torch's fake process group stands for the other ranks, so nothing is
trained here; that the bytes of the collectives are those of a real step is counted by benchmarks/footprint.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
import transformers
from deepspeed.utils import get_z3_leaf_modules, groups
from torch.testing._internal.distributed.fake_pg import FakeStore

import lift_ds
from lift_ds import LiftConfig
from lift_ds.model.weights import PrincipalWeight, principal_weights
from lift_ds.planner.estimate import Choice, setting_for
from lift_ds.planner.formulas import (
    GRADIENTS,
    INDEX,
    MASTER,
    MOMENTS,
    TRAINED,
    UNMANAGED,
    WEIGHTS,
    Setting,
    network_refresh,
    network_step,
    persistent,
)
from lift_ds.planner.models import ModelFacts, build_on_meta, facts_of
from lift_ds.planner.refresh_work import refresh_work
from lift_ds.refresh import store
from lift_ds.selection import MatrixSize, selection_cost
from lift_ds.selection.memory import carry_memory, selection_memory

#: Numbers of entries that the ranks do not divide, and that do not fill the words of an index.
ODD = LiftConfig(density=0.3, lra_rank=4, refresh_interval=20)

#: Name -> settings of LIFT, and what the model has that others do not.
CASES: dict[str, tuple[LiftConfig, dict[str, Any]]] = {
    "blocks": (dataclasses.replace(ODD, block_shape=(4, 4)), {}),
    "wide": (ODD, {"intermediate_size": 2**16 + 8, "hidden_size": 8, "num_hidden_layers": 1}),
    "parts": (dataclasses.replace(ODD, refresh_parts=4), {}),
    "extra": (dataclasses.replace(ODD, extra_trainable=("norm.weight", "lm_head")), {}),
    "head": (
        dataclasses.replace(ODD, index_placement="replicated"),
        {"architectures": ["LlamaForSequenceClassification"], "num_labels": 3},
    ),
}
CASES["copies"] = dataclasses.replace(ODD, frozen_weights="2"), {"model_type": "llama"}
#: Mixtures of experts: the blocks of the first are leaf modules of ZeRO-3, those of the second are not.
MIXTURES = {"mixtral": "MixtralForCausalLM", "gpt_oss": "GptOssForCausalLM"}
CASES |= {
    kind: (
        ODD,
        {
            "model_type": kind, "architectures": [kind_of_model], "num_local_experts": 4, "num_experts_per_tok": 2,
            "head_dim": 8,
        },
    )
    for kind, kind_of_model in MIXTURES.items()
}  # fmt: skip
#: Stage of ZeRO, number of ranks, and the one of them that is looked at.
RANKS = ((1, 2, 1), (2, 5, 4), (3, 2, 0), (3, 3, 2), (3, 4, 3))


@dataclass(frozen=True)
class Planned:
    """An engine, and what the planner knows of its run."""

    engine: Any
    config: LiftConfig
    facts: ModelFacts
    setting: Setting

    @property
    def layers(self) -> list[PrincipalWeight]:
        return [layer for _, layer in principal_weights(self.engine.module)]

    def dense(self) -> list[Any]:
        """What is trained beside the principal values."""
        values = {id(layer.principal_values) for layer in self.layers}
        return [p for p in self.engine.module.parameters() if p.requires_grad and id(p) not in values]

    def frozen(self) -> list[Any]:
        """What is neither trained nor managed."""
        managed = {id(p) for layer in self.layers for p in (layer.weight, layer.principal.index.words)}
        return [p for p in self.engine.module.parameters() if not p.requires_grad and id(p) not in managed]

    def index_bytes(self) -> int:
        """Of the indices, what this rank holds."""
        sharded = None if self.setting.stage == 3 else self.engine.optimizer.driver.store._index
        if sharded is not None:
            return sum(shard.nbytes for shard in sharded._shards.values())
        return own_bytes(layer.principal.index.words for layer in self.layers)


def own_bytes(parameters: Iterable[Any]) -> int:
    """Bytes of parameters on this rank: of their shards where ZeRO-3 partitions them."""
    return sum(getattr(p, "ds_tensor", p).numel() * p.element_size() for p in parameters)


def elements(parameters: Iterable[Any]) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) for p in parameters)


@pytest.fixture(scope="module", params=RANKS, ids=lambda one: f"zero{one[0]}-rank{one[2]}of{one[1]}")
def place(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    """Be one of several ranks; the stage and how many there are."""
    stage, ranks, rank = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        for name in ("_WORLD_GROUP", "_ZERO_PARAM_INTRA_PARALLEL_GROUP"):  # DeepSpeed keeps those of an earlier world
            patch.setattr(groups, name, None)
        dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
        deepspeed.init_distributed("fake", auto_mpi_discovery=False, verbose=False)
        yield stage, ranks
        dist.destroy_process_group()
        deepspeed.comm.comm.cdb = None


@pytest.fixture(scope="module", params=CASES)
def planned(request: pytest.FixtureRequest, place: tuple[int, int]) -> Planned:
    (stage, ranks), (config, changes) = place, CASES[request.param]
    copies = stage == 3 and config.frozen_weights not in ("auto", "all")
    if copies and ranks % 2:
        pytest.skip("two ranks share a copy")
    sizes = {
        "hidden_size": 32, "intermediate_size": 76, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 97, "pad_token_id": 0, "architectures": ["LlamaForCausalLM"],
    }  # fmt: skip
    chosen = sizes | changes
    settings = transformers.AutoConfig.for_model(chosen.pop("model_type", "llama"), **chosen)
    model = getattr(transformers, settings.architectures[0])(settings).to(torch.bfloat16)
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 10**6}
    ds_config = {
        "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": zero,
        "lift": config.to_dict(),
    }  # fmt: skip
    engine = lift_ds.initialize(model=model, config=ds_config, resume=True)[0]  # sizes are all that is asked for
    facts = facts_of(settings.model_type, settings, build_on_meta(settings, config))
    choice = Choice("lift", stage, copy_ranks=2 * copies)
    setting = setting_for(facts, config, choice, ranks, device_type="cpu")
    return Planned(engine, config, facts, dataclasses.replace(setting, live=0))


def test_what_a_rank_holds(planned: Planned) -> None:
    found, wrapper = persistent(planned.setting), planned.engine.optimizer
    values = [layer.principal_values for layer in planned.layers]
    assert found[WEIGHTS] == own_bytes(layer.weight for layer in planned.layers)
    assert found[UNMANAGED] == own_bytes(planned.frozen())
    assert found[TRAINED] == own_bytes([*values, *planned.dense()])
    assert found[INDEX] == planned.index_bytes()
    partitioned = planned.setting.stage == 3
    masters = wrapper.fp32_partitioned_groups_flat if partitioned else wrapper.single_partition_of_fp32_groups
    assert found[MASTER] == sum(master.nbytes for master in masters)
    assert found[MOMENTS] == 2 * found[MASTER]  # AdamW has two like each of them
    if partitioned:
        assert found[GRADIENTS] == wrapper.grad_partitions_flat_buffer.nbytes


def test_what_a_step_sends(planned: Planned) -> None:
    found, ranks = network_step(planned.setting), planned.setting.ranks
    values = [layer.principal_values for layer in planned.layers]
    gradients = 2 * elements([*values, *planned.dense()])
    if planned.setting.stage < 3:
        updated = sum(flat.nbytes for flat in planned.engine.optimizer.bit16_groups_flat)
        gathered = planned.index_bytes() if planned.config.index_placement == "sharded" else 0
        assert found == {"all_reduce": gradients, "all_gather": updated + ranks * gathered}
        return
    # A leaf module is fetched with all that is in it: θ twice, the index once more than backward needs it.
    leaves = get_z3_leaf_modules(planned.engine.module)
    inside = [layer for leaf in leaves for _, layer in principal_weights(leaf)]
    assert bool(inside) == (planned.facts.name == "mixtral")
    # For the write-back θ; what is dense beside in forward and in backward.
    trained = own_bytes([*values, *planned.dense(), *planned.dense(), *2 * [one.principal_values for one in inside]])
    # In backward and for the write-back.
    index = 2 * planned.index_bytes() + own_bytes(layer.principal.index.words for layer in inside)
    # Backward needs every weight but the embeddings.
    weights = 2 * elements([*(layer.weight for layer in planned.layers), *planned.frozen()])
    weights -= elements([planned.engine.module.get_input_embeddings().weight])
    sharers = 2 if planned.setting.copy_ranks else ranks
    frozen, everywhere = 2 * weights + sharers * index, ranks * trained
    if sharers == ranks:
        assert found == {"reduce_scatter": gradients, "all_gather": everywhere + frozen}
    else:
        assert found == {"reduce_scatter": gradients, "all_gather": everywhere, "all_gather in node": frozen}


def test_what_a_refresh_sends(planned: Planned) -> None:
    ranks, layers = planned.setting.ranks, planned.layers
    words = 4 * sum(layer.principal.index.word_count() for layer in layers)
    entries = sum(layer.entries() for layer in layers)
    if planned.setting.stage < 3:
        expected = {"broadcast": words}
    else:
        sharers = 2 if planned.setting.copy_ranks else ranks
        end = " in node" if sharers < ranks else ""
        alone = own_bytes(layer.weight for layer in layers if layer.matrices == 1)
        expected = {
            f"gather{end}": sharers * alone * sharers / ranks,  # one of the copies goes to an owner
            "broadcast": words + 2 * entries,
            f"all_gather{end}": sharers * planned.index_bytes(),
        }
        stacks = 2 * elements(layer.weight for layer in layers if layer.matrices > 1)
        if stacks:  # what the owner of a matrix does not hold, of all ranks together, on one of them
            expected[f"send{end}"] = stacks * (sharers - 1) / sharers / ranks
    assert network_refresh(planned.setting) == expected


def test_a_refresh_is_that_of_the_driver(planned: Planned) -> None:
    setting, driver = planned.setting, planned.engine.optimizer.driver
    found = refresh_work(planned.facts, planned.config, setting.ranks, setting.stage)
    plan, collected = driver.plan, setting.stage == 3
    weights = {name: matrix.weight for name, matrix in driver.attachment.matrices.items()}
    sizes = {name: MatrixSize.of(weight.shape(), 2) for name, weight in weights.items()}
    entries = {name: weight.layout.of_one.entries for name, weight in weights.items()}

    def cost(name: str) -> int:
        size = sizes[name]
        return selection_cost(size.rows, size.columns, planned.config.lra_rank, plan.settings[name].solver)

    def memory(own: list[str], part: list[str]) -> int:
        # An index, and in ZeRO-3 the weights there, wait from its selection until the last one of the part.
        held = sum(4 * weights[name].layout.of_one.word_count() for name in own)
        held += sum(2 * entries[name] for name in own) if collected else 0
        work = [selection_memory(sizes[name], plan.settings[name]) + collected * sizes[name].bytes for name in own]
        return held + max([*work, *(carry_memory(entries[name]) for name in part)])

    assert found.matrices == [len(plan.jobs_of(rank)) for rank in range(setting.ranks)]
    assert found.parts == [[sum(map(cost, own)) for own in jobs] for jobs in plan.parts.values()]
    assert len(found.parts) == planned.config.refresh_parts
    assert found.slowest == sum(max(sum(map(cost, own)) for own in jobs) for jobs in plan.parts.values())
    parts = [(jobs, [name for own in jobs for name in own]) for jobs in plan.parts.values()]
    assert found.memory == max(memory(own, part) for jobs, part in parts for own in jobs)


@pytest.mark.parametrize(
    ("entries", "runs"),
    [
        ([], []),
        ([20], [[20]]),
        ([20, 1], [[20], [1]]),
        ([3, 3, 4, 1], [[3, 3, 4], [1]]),
        ([1, 20, 1], [[1], [20], [1]]),
    ],
)
def test_a_write_back_gathers_as_many_matrices_as_fit(
    entries: list[int], runs: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "WRITE_BACK_BATCH", 10)
    assert [entries[batch] for batch in store.write_back_batches(entries)] == runs
