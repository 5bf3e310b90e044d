"""Pins what each option of a DeepSpeed file comes to: it trains as without it, or is refused by its key before anything
is loaded. The table in the documentation is made from the same cases (`tests/unit/test_docs.py`).

The fast tests try each option in one of its stages, the slow ones in all of them, and resume there. Two ranks;
round-robin gradients on two and four, in every precision and with the optimizer offloaded.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from cases import build
from deepspeed.pipe import PipelineModule
from deepspeed.runtime import config as ds_config
from deepspeed.runtime.superoffload.superoffload_stage3 import SuperOffloadOptimizer_Stage3
from deepspeed.runtime.zenflow.zenflow_stage_1_and_2 import ZenFlowZeroOptimizer
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import (
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
)
from harness import run_ranks
from option_cases import ELSEWHERE, EXACT, OPTIONS, REFUSED_VALUES, TOGETHER, Option
from torch import nn

import lift_ds
from lift_ds.zero.bind import STORES
from lift_ds.zero.options import REFUSED, refuse_options, refuse_pipeline

Results = dict[str, Any]
#: One stage of each option, for the fast tests, and all.
FAST_CASES = [pytest.param(option, option.stages[-1], id=option.case(option.stages[-1])) for option in OPTIONS]
CASES = [pytest.param(option, stage, id=option.case(stage)) for option in OPTIONS for stage in option.stages]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    return run_ranks("options", 2, tmp_path_factory.mktemp("options"), "every_option")


@pytest.fixture(scope="module")
def runs(ranks: list[Results]) -> Results:
    return ranks[0]


@pytest.mark.parametrize("stage", range(4))
def test_a_refresh_does_not_trust_a_state_that_is_not_that_of_the_weights(ranks: list[Results], stage: int) -> None:
    """Both ranks stop, before anything is selected; in stages 1 to 3 it is rank 1 that has the wrong values."""
    for results in ranks:
        run = results[f"refresh stage {stage}"]
        assert "the optimizer's master values are not the trained weights in 1 of 14 matrices" in run["message"]
        assert re.search(r"the first of them model\.layers\.\d\.\w+\.\w+_proj \(at 5 of \d+ entries\)", run["message"])
        assert "refreshed" not in run
        assert all(torch.equal(run["indices"][name], index) for name, index in run["before"].items())


@pytest.mark.parametrize("stage", [2, 3])
def test_a_loaded_checkpoint_is_not_trusted_either(ranks: list[Results], stage: int) -> None:
    for results in ranks:
        message = results[f"load stage {stage}"]["message"]
        assert "RuntimeError: the optimizer's master values are not the trained weights in 1 of 14" in message


@pytest.mark.parametrize("stage", [1, 2])
def test_ranks_that_run_their_layers_in_different_orders_are_told_so(ranks: list[Results], stage: int) -> None:
    for results in ranks:
        message = results[f"orders stage {stage}"]
        assert (
            "the ranks run different layers at the same time in backward: rank 0 layers.2, rank 1 layers.1" in message
        )


@pytest.mark.parametrize(("option", "stage"), FAST_CASES)
def test_an_option_that_works_changes_nothing(option: Option, stage: int, runs: Results) -> None:
    check_option(option, stage, runs)


def check_option(option: Option, stage: int, runs: Results) -> None:
    found, expected = runs[option.case(stage)], runs[f"{'bf16' if option.bf16 else 'fp32'} stage {stage}"]
    assert found["refreshes"] == [2, 4]
    if option.outcome != EXACT:
        # Rounded to bfloat16 on the way, clipped or summed: steps of the same size in directions nearly the same.
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-3)
        return
    check_equal(found, expected)


def check_equal(found: Results, expected: Results) -> None:
    """Sums in another order at most: float32's 6e-8 a step; bfloat16 rounds such differences away."""
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    for name, index in expected["indices"].items():
        assert torch.equal(found["indices"][name], index), name
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_options_that_work_together_change_nothing(stage: int, runs: Results) -> None:
    """Neither do they where the run is resumed after the third step."""
    check_equal(runs[f"together stage {stage}"], runs[f"fp32 stage {stage}"])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_steps_that_overflow_in_float16_leave_nothing_behind(stage: int, runs: Results) -> None:
    """A loss scale is a power of two, so that another one changes gradients by no digit, but for the very smallest."""
    run = runs[f"fp16 stage {stage}"]
    assert 4 <= len(run["applied"]) <= 9  # of twelve
    assert run["found"]["refreshes"] == run["expected"]["refreshes"]
    assert run["found"]["refreshes"][:2] == [2, 4]
    check_equal(run["found"], run["expected"])


def test_what_auto_becomes_is_refused_too(ranks: list[Results]) -> None:
    """By every rank, so that none of them waits."""
    for results in ranks:
        assert (
            "fp16.enabled=True in the DeepSpeed configuration is not supported in ZeRO stage 0" in results["fp16 auto"]
        )


class Asked(dict[str, Any]):
    """A configuration that takes note of what it is asked for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.keys_asked: set[str] = set()

    def keys(self) -> Any:
        return self

    def __contains__(self, key: object) -> bool:
        self.keys_asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.keys_asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_asked.add(key)
        return super().get(key, default)


def options_of_deepspeed() -> set[str]:
    """What this version of DeepSpeed looks for in a file, but for what it refuses itself."""
    asked = Asked(train_batch_size=1)
    ds_config.DeepSpeedConfig(asked)
    found = asked.keys_asked - {*ds_config._REMOVED_TOP_LEVEL_CONFIG_KEYS}
    zero = "zero_optimization"
    found |= {f"{zero}.{field.alias or name}" for name, field in DeepSpeedZeroConfig.model_fields.items()}
    for what, kind in (("param", DeepSpeedZeroOffloadParamConfig), ("optimizer", DeepSpeedZeroOffloadOptimizerConfig)):
        found |= {f"{zero}.offload_{what}.{name}" for name in kind.model_fields if name != "device"}
    return found


def test_the_table_has_every_option_of_deepspeed() -> None:
    """A new version with a new option needs a new row; so does a spelling that no version knows."""
    rows = [option.key for option in (*OPTIONS, *TOGETHER)] + [option.key for option in REFUSED] + [*ELSEWHERE]
    named = {*rows} | {key.split(".")[0] for key in rows} | {"bfloat16"}  # an old name of bf16
    missing = options_of_deepspeed() - named
    assert not missing
    unknown = {key for key in rows if key.startswith("zero_optimization.")} - options_of_deepspeed()
    assert not unknown


ROUND_ROBIN = [f"stage {s} bf16 {b} offload {o}" for s in (1, 2) for b in (False, True) for o in (False, True)]


@pytest.fixture(scope="module")
def less_usual(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_ranks("options", 2, tmp_path_factory.mktemp("less_usual"), "less_usual")[0]


@pytest.fixture(scope="module")
def round_robin_on_four(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_ranks("options", 4, tmp_path_factory.mktemp("round_robin_on_four"), "round_robin")[0]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_ranks("options", 2, tmp_path_factory.mktemp("resumed"), "resumed")[0]


@pytest.mark.slow
@pytest.mark.parametrize(("option", "stage"), CASES)
def test_an_option_changes_nothing_in_any_stage_and_resumes_continue_to_the_bit(
    option: Option, stage: int, resumed: Results
) -> None:
    check_option(option, stage, resumed)
    found, expected = resumed[f"resumed {option.case(stage)}"], resumed[option.case(stage)]
    assert found["losses"] == expected["losses"]
    for what in ("weights", "indices"):
        assert all(torch.equal(found[what][name], expected[what][name]) for name in expected[what])


@pytest.mark.slow  # float32 without offload is among the options
@pytest.mark.parametrize("case", ROUND_ROBIN)
def test_round_robin_gradients_change_nothing(case: str, less_usual: Results) -> None:
    check_equal(less_usual[f"with {case}"], less_usual[f"without {case}"])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_compiled_engine_trains_the_same(stage: int, less_usual: Results) -> None:
    check_equal(less_usual[f"compiled stage {stage}"], less_usual[f"stage {stage}"])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_random_ltd_that_drops_no_token_changes_nothing(stage: int, less_usual: Results) -> None:
    check_equal(less_usual[f"random-LTD stage {stage}"], less_usual[f"stage {stage}"])


@pytest.mark.slow
def test_leaf_modules_set_by_a_call_change_nothing(less_usual: Results) -> None:
    check_equal(less_usual["leaf modules"], less_usual["stage 3"])


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_a_layer_that_is_not_run_is_named(stage: int, less_usual: Results) -> None:
    said = [line for line in less_usual[f"idle layer stage {stage}"] if "no gradient has reached" in line]
    assert len(said) == 2  # after the first step and after the first refresh
    assert all("1 of 3 managed weights, which are not trained: layers.1. " in line for line in said)


@pytest.mark.slow
@pytest.mark.parametrize("case", ROUND_ROBIN)
def test_round_robin_gradients_change_nothing_on_four_ranks(case: str, round_robin_on_four: Results) -> None:
    check_equal(round_robin_on_four[f"with {case}"], round_robin_on_four[f"without {case}"])


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused.key)
def test_an_option_that_is_not_supported_is_refused_by_its_key(refused: Any) -> None:
    """By `initialize`, before the model is touched."""
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "lift": {"density": 0.1}}
    Option(refused.key, REFUSED_VALUES[refused.key], ()).apply(config)
    model = build("llama")
    with pytest.raises(ValueError, match="in the DeepSpeed configuration is not supported") as error:
        lift_ds.initialize(model=model, config=config)
    assert str(error.value).startswith(f"{refused.key}=")
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"tensor_parallel": {"autotp_size": 1}, "expert_parallel": {"enabled": False}},
        {"compile": {"deepcompile": False}, "hybrid_engine": {"enabled": False}},
        {"zero_optimization": {"offload_optimizer": {"device": "cpu", "super_offload": False, "ratio": 1.0}}},
        {"zero_optimization": {"zero_quantized_weights": False, "zenflow": None}},
        {"zero_optimization": True, "bf16": {"enabled": "auto"}},
        {"zero_optimization": {"stage": 1}, "fp16": {"enabled": True}},
        {"fp16": {"enabled": "auto"}, "datastates_ckpt": False},
    ],
    ids=str,
)
def test_an_option_that_is_off_is_not_refused(config: dict[str, Any]) -> None:
    refuse_options(config)


def test_a_pipeline_is_refused() -> None:
    class Stages(PipelineModule):
        def __init__(self) -> None:
            nn.Module.__init__(self)  # its own needs ranks

    with pytest.raises(ValueError, match="Stages is a PipelineModule, which is not supported"):
        refuse_pipeline(Stages())


def test_classes_derived_from_an_optimizer_of_deepspeed_are_not_taken_for_it() -> None:
    """They may keep their states elsewhere, as those of ZenFlow and SuperOffload do."""
    for kind in (SuperOffloadOptimizer_Stage3, ZenFlowZeroOptimizer):
        assert issubclass(kind, tuple(STORES))
        assert kind not in STORES
