"""Pins which configurations the planner reads and what it finds in them: for each architecture the matrices, trained
entries and parameters of a real model that LIFT is attached to, the sizes that the formulas go by, and what the plan
says it assumes; the counts of published models; and one clear error where transformers would fill in another model.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import CASES, FALCON, LLAMA, PUBLISHED, VISION, Case

import lift_ds
from lift_ds import LiftConfig, cli
from lift_ds.model.weights import principal_weights
from lift_ds.planner.models import ModelFacts, read_facts

CONFIG = LiftConfig(budget_rank=2, lra_rank=2)


def folder_with(content: dict[str, Any], folder: Path) -> str:
    (folder / "config.json").write_text(json.dumps(content))
    return str(folder)


@dataclass(frozen=True)
class Planned:
    """A case, the folder with its config.json, and what the planner reads there."""

    case: Case
    folder: str
    facts: ModelFacts


@pytest.fixture(scope="module", params=CASES)
def planned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Planned:
    case = CASES[request.param]
    folder = folder_with(case.content, tmp_path_factory.mktemp("model"))
    return Planned(case, folder, read_facts(folder, CONFIG))


def real_model(case: Case, folder: str) -> Any:
    """The model as transformers makes it of the same folder, with weights, and LIFT attached."""
    settings = transformers.AutoConfig.from_pretrained(folder)
    torch.manual_seed(3)
    return lift_ds.attach(getattr(transformers, case.model)(settings), CONFIG)


def sizes_of(module: Any, weight: torch.Tensor) -> tuple[int, int, int]:
    """How many matrices a weight is, and their rows and columns."""
    if weight.dim() == 3 and not hasattr(module, "kernel_size"):
        return tuple(weight.shape)
    return (1, weight.shape[0], math.prod(weight.shape[1:]))


def test_a_plan_has_the_matrices_entries_and_parameters_of_the_real_model(planned: Planned) -> None:
    found, model = planned.facts, real_model(planned.case, planned.folder)
    layers = dict(principal_weights(model))
    sizes = {name: (found.matrices[name], *shape) for name, shape in found.shapes.items()}
    assert sizes == {name: sizes_of(layer.module, layer.weight) for name, layer in layers.items()}
    assert list(found.shapes) == list(layers)
    assert found.entries == {name: len(layer.principal_values) for name, layer in layers.items()}
    of_lift = {id(parameter) for layer in layers.values() for parameter in layer.principal.parameters()}
    plain = {name: p.numel() for name, p in model.named_parameters() if id(p) not in of_lift}
    assert found.parameters == sum(plain.values())
    assert sorted(found.others) == sorted(
        plain[name] for name in plain.keys() - {layer.full_name for layer in layers.values()}
    )


def test_the_sizes_of_the_formulas_are_read_off_the_model(planned: Planned) -> None:
    case, found = planned.case, planned.facts
    assert (found.hidden, found.vocabulary) == (16, 50)
    sizes = (found.layers, found.intermediate, found.key_value, found.heads)
    assert sizes == (case.layers, case.intermediate, case.key_value, case.heads)
    assert all(part in difference for part, difference in zip(case.said, found.differences, strict=True))


def test_a_plan_runs_to_its_end_and_says_what_it_assumes(
    planned: Planned, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case, output = planned.case, tmp_path / "plan.json"
    arguments = ["--gpus-per-node", "2", "--budget-rank", "2", "--json", str(output)]
    assert cli.main(["plan", "--model", planned.folder, *arguments]) == 0
    said = capsys.readouterr().out
    assert "<- recommended" in said
    assumed = [line for line in said.splitlines() if "as of a decoder of the Llama family" in line]
    assert len(assumed) == bool(case.said)
    assert all(part in assumed[0] for part in case.said)
    written = json.loads(output.read_text())
    assert written["model"]["parameters"] == planned.facts.parameters
    assert len(written["model"]["differs_from_llama"]) == len(case.said)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_has_the_parameters_of_its_model(name: str, tmp_path: Path) -> None:
    parameters, content = PUBLISHED[name]
    assert read_facts(folder_with(content, tmp_path), CONFIG).parameters == parameters


def test_an_older_name_is_read_where_transformers_reads_it(tmp_path: Path) -> None:
    parameters, content = PUBLISHED["falcon-7b"]
    older = {name: value for name, value in content.items() if not name.startswith("num_")}
    # Transformers passes over these two, and takes what happens to be the same.
    found = read_facts(folder_with({**older, "n_head": 71, "n_layer": 32}, tmp_path), CONFIG)
    assert found.parameters == parameters
    with pytest.raises(ValueError, match="passes over n_layer=60 of a model of type 'falcon' and takes 32"):
        read_facts(folder_with({**older, "n_head": 71, "n_layer": 60}, tmp_path), CONFIG)


def test_what_a_section_leaves_to_its_class_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, content = PUBLISHED["gemma-3-4b"]
    found: ModelFacts = read_facts(folder_with(content, tmp_path), CONFIG)
    assert found.left_out == ("num_attention_heads (8)", "vocab_size (262208)")
    assert cli.main(["plan", "--model", str(tmp_path), "--methods", "lift"]) == 0
    assert "defaults of transformers: num_attention_heads (8), vocab_size (262208)." in capsys.readouterr().out


def test_the_class_is_the_one_the_file_names_where_transformers_has_it(tmp_path: Path) -> None:
    content = CASES["llama"].content
    plain = read_facts(folder_with(content, tmp_path), CONFIG)
    unknown = read_facts(folder_with({**content, "architectures": ["LlamaForPoems"]}, tmp_path), CONFIG)
    assert unknown.parameters == plain.parameters
    # The class of another configuration, and one without a head.
    other = read_facts(folder_with({**content, "architectures": ["GPT2LMHeadModel"]}, tmp_path), CONFIG)
    assert other.parameters == plain.parameters
    headless = read_facts(folder_with({**content, "architectures": ["LlamaModel"]}, tmp_path), CONFIG)
    assert headless.parameters == plain.parameters
    named = read_facts(
        folder_with({**content, "architectures": ["LlamaForSequenceClassification"], "num_labels": 5}, tmp_path), CONFIG
    )
    assert named.parameters == plain.parameters - 50 * 16 + 5 * 16


def without(content: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name not in names}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (without(CASES["gpt2"].content, "n_layer", "n_head"), "has no n_layer, n_head; a plan needs n_embd, n_layer, "),
        (without(CASES["opt"].content, "ffn_dim"), "has no ffn_dim; "),
        (without(CASES["t5"].content, "d_kv"), "has no d_kv; "),
        (without(CASES["bart"].content, "decoder_layers"), "has no decoder_layers; "),
        (without(CASES["mamba"].content, "expand"), "has no expand; "),
        (without(CASES["falcon"].content, "hidden_size"), "has no hidden_size; "),
        (without(CASES["llava"].content, "text_config"), "has no text_config; a plan needs vision_config, text_config"),
        (without(CASES["llava"].content, "vision_config"), "has no vision_config; "),
        (without(CASES["qwen2_vl"].content, "intermediate_size"), "has no intermediate_size; "),
        ({**CASES["llava"].content, "text_config": {"model_type": "llama"}}, "text_config names none of hidden_size, "),
        ({**CASES["llava"].content, "text_config": "llama"}, "text_config is no JSON object"),
        (
            {**without(CASES["gemma3"].content, "text_config"), **LLAMA},
            "passes over hidden_size=16 of a model of type 'gemma3' and takes 2304; name text_config.hidden_size",
        ),
        (
            {**CASES["llava"].content, "text_config": {"model_type": "llama", **LLAMA, "num_hidden_layers": 0}},
            "text_config: num_hidden_layers is no whole number of at least 1, but 0",
        ),
        (
            {
                **CASES["llava"].content,
                "text_config": {"model_type": "falcon", **without(FALCON, "num_hidden_layers"), "n_layer": 5},
            },
            "passes over n_layer=5 of a model of type 'llava' and takes 32; name text_config.num_hidden_layers",
        ),
        ({**CASES["gpt2"].content, "n_embd": 0}, "n_embd is no whole number of at least 1, but 0"),
        ({**CASES["llama"].content, "num_attention_heads": 5}, "transformers does not take it"),
        ({**CASES["llama"].content, "rms_norm_eps": "small"}, "transformers does not take it"),
        ({**CASES["llama"].content, "hidden_act": "smile"}, "transformers cannot build a model from this LlamaConfig"),
        ({"model_type": "resnet", "architectures": ["ResNetBackbone"]}, "ResNetBackbone has no embeddings of tokens"),
        ({"model_type": "clip_vision_model", **VISION}, "no language model of model_type='clip_vision_model'"),
        ({**CASES["gpt2"].content, "n_layer": 1, "model_type": "xlm"}, "has no emb_dim"),
    ],
)  # fmt: skip
def test_a_configuration_that_cannot_be_planned_is_one_clear_error(
    content: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "--model", folder_with(content, tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1
