"""LiftConfig: every setting that is out of range is refused with its name and what would be valid; k follows the
formula of the paper; a config survives the way through JSON; "auto" in a DeepSpeed file is resolved or refused.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import build

import lift_ds
from lift_ds import LiftConfig
from lift_ds.config import read_ds_config
from lift_ds.zero.engine import refuse_optimizer_block, resolve_auto


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "neither of budget_rank=None and density=None"),
        ({"budget_rank": 4, "density": 0.1}, "both of budget_rank=4 and density=0.1"),
        ({"budget_rank": 0}, "budget_rank=0 is not a whole number of at least 1"),
        ({"budget_rank": -1}, "budget_rank=-1 is not"),
        ({"budget_rank": 2.5}, "budget_rank=2.5 is not"),
        ({"budget_rank": True}, "budget_rank=True is not"),
        ({"density": 0}, r"density=0 is not a share in \(0, 1\]"),
        ({"density": -0.1}, "density=-0.1 is not"),
        ({"density": 1.0001}, "density=1.0001 is not"),
        ({"density": math.nan}, "density=nan is not"),
        ({"density": "5%"}, "density='5%' is not"),
        ({"density": True}, "density=True is not"),
        ({"budget_rank": 4, "lra_rank": 0}, "lra_rank=0 is not a whole number of at least 1"),
        ({"budget_rank": 4, "lra_rank": "128"}, "lra_rank='128' is not"),
        ({"budget_rank": 4, "refresh_interval": 0}, "refresh_interval=0 is not a whole number of at least 1"),
        ({"budget_rank": 4, "refresh_interval": 1.5}, "refresh_interval=1.5 is not"),
        ({"budget_rank": 4, "refresh_parts": 0}, "refresh_parts=0 is not a whole number of at least 1"),
        ({"budget_rank": 4, "refresh_parts": 201}, "refresh_parts=201 is more than the 200 steps of refresh_interval"),
        ({"budget_rank": 4, "selection_tolerance": 0}, r"selection_tolerance=0 is not a share in \(0, 1\)"),
        ({"budget_rank": 4, "selection_tolerance": 1}, r"selection_tolerance=1 is not a share in \(0, 1\)"),
        ({"budget_rank": 4, "seed": -1}, "seed=-1 is not a whole number of at least 0"),
        ({"budget_rank": 4, "seed": 0.5}, "seed=0.5 is not a whole number"),
        ({"budget_rank": 4, "block_shape": 4}, r"block_shape=4 is not a pair of whole numbers such as \[4, 4\]"),
        ({"budget_rank": 4, "block_shape": [4, 0]}, "block_shape=0 is not a whole number of at least 1"),
        ({"budget_rank": 4, "solver": "gramm"}, "solver='gramm' is not one of .*did you mean 'gram'"),
        ({"budget_rank": 4, "target_modules": "LIFT_MPL"}, "'LIFT_MPL' is not a preset.*did you mean 'LIFT_MLP'"),
        ({"budget_rank": 4, "target_modules": "q_proj"}, "'q_proj' is not a preset; give a list"),
        ({"budget_rank": 4, "target_modules": []}, "target_modules=.* matches nothing"),
        ({"budget_rank": 4, "target_modules": ["q_proj", 3]}, "target_modules=.* is not a list of names"),
        ({"budget_rank": 4, "extra_trainable": "bias"}, "extra_trainable='bias' is not a list of names"),
        ({"budget_rank": 4, "extra_trainable": [""]}, "extra_trainable=.* is not a list of names"),
        ({"budget_rank": 4, "lr": -1e-4}, "lr=-0.0001 is not a number of at least 0"),
        ({"budget_rank": 4, "lr": math.inf}, "lr=inf is not"),
        ({"budget_rank": 4, "lr": "1e-4"}, "lr='1e-4' is not"),
        ({"budget_rank": 4, "eps": -1}, "eps=-1 is not"),
        ({"budget_rank": 4, "weight_decay": math.nan}, "weight_decay=nan is not"),
        ({"budget_rank": 4, "stall_timeout": 0}, "stall_timeout=0 is not a number of seconds above 0, or null"),
        ({"budget_rank": 4, "stall_timeout": math.inf}, "stall_timeout=inf is not"),
        ({"budget_rank": 4, "stall_timeout": "30"}, "stall_timeout='30' is not"),
        ({"budget_rank": 4, "betas": [0.9]}, "betas=.* is not a pair"),
        ({"budget_rank": 4, "betas": [0.9, 1.0]}, "betas=1.0 is not a number of at least 0 and below 1"),
        ({"budget_rank": 4, "betas": 0.9}, "betas=0.9 is not a pair"),
        ({"budget_rank": 4, "refresh_intervall": 7}, "'refresh_intervall'.*did you mean 'refresh_interval'"),
        ({"budget_rank": 4, "xyzzy": 7}, "'xyzzy' in the \"lift\" block; the settings are budget_rank, density"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_bad_setting_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LiftConfig.from_dict(settings)


@pytest.mark.parametrize("block", [None, 3, "budget_rank", [["budget_rank", 4]]])
def test_block_that_is_no_object_is_refused(block: Any) -> None:
    with pytest.raises(ValueError, match="must be an object of settings"):
        LiftConfig.from_ds_config({"lift": block})


@pytest.mark.parametrize("settings", [{"density": 1}, {"density": 1.0}, {"budget_rank": 1, "lra_rank": 1, "lr": 0}])
def test_settings_at_the_edge_of_their_range_are_valid(settings: dict[str, Any]) -> None:
    config = LiftConfig.from_dict(settings)
    assert all(getattr(config, name) == value for name, value in settings.items())


@pytest.mark.parametrize(
    ("settings", "rows", "columns", "k"),
    [
        ({"budget_rank": 3}, 40, 50, 3 * 90),
        ({"budget_rank": 128}, 4096, 11008, 128 * (4096 + 11008)),
        ({"budget_rank": 128}, 64, 64, 64 * 64),  # a LoRA of that rank would have more entries than the matrix
        ({"budget_rank": 1}, 2, 2, 4),  # exactly m * n
        ({"density": 0.05}, 100, 200, 1000),
        ({"density": 0.5}, 3, 5, 8),  # 7.5 rounds to the even neighbour, as Python does
        ({"density": 1e-9}, 10, 10, 1),  # never none
        ({"density": 1.0}, 7, 9, 63),
    ],
)
def test_entries_of_a_matrix(settings: dict[str, Any], rows: int, columns: int, k: int) -> None:
    assert LiftConfig(**settings).entries(rows, columns) == k


@pytest.mark.parametrize(
    "config",
    [
        LiftConfig(budget_rank=7),
        LiftConfig(density=0.25, target_modules=("q_proj", "mlp.up_proj"), extra_trainable=("bias",), solver="svd"),
        LiftConfig(density=0.25, target_modules="LIFT_MLP", betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1, lr=1e-3),
    ],
)
def test_round_trip_through_json(config: LiftConfig) -> None:
    assert LiftConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_defaults_are_the_papers() -> None:
    config = LiftConfig(budget_rank=128)
    assert (config.lra_rank, config.betas, config.weight_decay) == (128, (0.9, 0.95), 0.0)
    assert 200 <= config.refresh_interval <= 400


def test_config_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"train_batch_size": 4, "lift": {"density": 0.5, "target_modules": ["q_proj"]}}')
    assert LiftConfig.from_ds_config(path) == LiftConfig(density=0.5, target_modules=("q_proj",))
    assert LiftConfig.from_ds_config(str(path)) == LiftConfig.from_ds_config(json.loads(path.read_text()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "bad.json' does not exist"),
        ('{\n "lift": {},\n broken\n}', "bad.json:3: not valid JSON"),
        ("", "bad.json:1: not valid JSON"),
        ("[1]", "bad.json: needs a JSON object, this is a list"),
        ('{"zero_optimization": {"lift": {"density": 0.5}}}', 'bad.json has no top-level "lift" block'),
    ],
    ids=["missing", "malformed", "empty", "list", "no block"],
)
def test_bad_file_is_refused_with_its_name(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "bad.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        LiftConfig.from_ds_config(path)


def test_content_without_block_is_refused() -> None:
    with pytest.raises(ValueError, match='the DeepSpeed configuration has no top-level "lift" block'):
        LiftConfig.from_ds_config({"train_batch_size": 4})


def test_content_is_copied_not_shared() -> None:
    content = {"zero_optimization": {"stage": 2}}
    read_ds_config(content)["zero_optimization"]["stage"] = 3
    assert content == {"zero_optimization": {"stage": 2}}


def test_optimizer_block_is_refused() -> None:
    refuse_optimizer_block({"lift": {"density": 0.5}})
    with pytest.raises(ValueError, match=r'has an "optimizer" block.*AdamW.*remove it'):
        refuse_optimizer_block({"optimizer": {"type": "AdamW"}})
    with pytest.raises(ValueError, match="remove it"):  # before anything is done to the model
        lift_ds.initialize(model=build("matrices"), config={"optimizer": {"type": "AdamW"}, "lift": {"density": 0.5}})


def _attached(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return lift_ds.attach(build("llama", dtype), LiftConfig(budget_rank=2, lra_rank=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_is_resolved_from_the_model(dtype: torch.dtype, lift_log: list[str]) -> None:
    given: dict[str, Any] = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 3, "reduce_bucket_size": "auto", "allgather_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
        },
        "lift": {"density": 0.5, "solver": "auto"},
    }  # fmt: skip
    before = json.dumps(given)
    resolved = resolve_auto(given, _attached(dtype))
    width = 32  # hidden_size of the model
    assert resolved == {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "zero_optimization": {
            "stage": 3, "reduce_bucket_size": width**2, "allgather_bucket_size": width**2,
            "stage3_prefetch_bucket_size": int(0.9 * width**2), "stage3_param_persistence_threshold": 10 * width,
        },
        "lift": {"density": 0.5, "solver": "auto"},  # LIFT's own "auto" is no business of DeepSpeed's
    }  # fmt: skip
    assert json.dumps(given) == before
    assert any("gradient_clipping=1.0" in line for line in lift_log)


def test_auto_without_a_meaning_is_refused() -> None:
    with pytest.raises(ValueError, match=r'zero_optimization\.stage="auto".*give a value'):
        resolve_auto({"zero_optimization": {"stage": "auto"}}, _attached())


def test_configuration_without_auto_stays_as_it_is(lift_log: list[str]) -> None:
    given = {"train_batch_size": 4, "zero_optimization": {"stage": 1}}
    model = _attached()
    lift_log.clear()
    assert resolve_auto(given, model) == given
    assert lift_log == []
