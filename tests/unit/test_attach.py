"""attach and detach: which layers of which models are managed, that nothing else about a model changes, that what
cannot work is refused by name with the model unchanged, and what the log says.

Each family of models trains three steps and may change the principal entries alone, to the bit (invariant 1).
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from cases import VOCABULARY, Matrices, build, small_llama, token_batch
from helpers import changed_positions, index_sets, layers_of, numpy_low_rank, same_bits, snapshot, sorted_selection
from torch import nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.pytorch_utils import Conv1D

import lift_ds
from lift_ds.model.attach import dry_attach
from lift_ds.model.attachment import attachment_of, leave_out_of_saved_models
from lift_ds.model.kinds import managed_class
from lift_ds.model.layers import LiftLinear
from lift_ds.model.readings import ReadModule

CONFIG = lift_ds.LiftConfig(budget_rank=3, lra_rank=4, refresh_interval=100)

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
CONV1D = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
#: Family -> what LIFT manages by default in each of its two layers.
FAMILIES = {
    "llama": ("model.layers", ATTENTION + MLP),
    "qwen2": ("model.layers", ATTENTION + MLP),
    "gemma": ("model.layers", ATTENTION + MLP),
    "gpt2": ("transformer.h", CONV1D),
    "mixtral": ("model.layers", (*ATTENTION, "mlp.experts.gate_up_proj", "mlp.experts.down_proj")),
}


def small_model(family: str) -> Any:
    """A model of two layers with the same weights at every call."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(21)
    if family == "llama":
        return small_llama()
    if family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**sizes))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
        return model
    if family == "gemma":
        return GemmaForCausalLM(GemmaConfig(**sizes, head_dim=8))
    if family == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            )
        )  # fmt: skip
    return MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4, experts_implementation="eager"))


def expected_names(family: str) -> set[str]:
    stem, names = FAMILIES[family]
    return {f"{stem}.{layer}.{name}" for layer in range(2) for name in names}


def principal_of(name: str) -> str:
    """What the module with θ and I of a weight is called."""
    return f"{name}_principal" if ".experts." in name else f"{name}.principal"


def language_loss(model: Any, step: int) -> torch.Tensor:
    tokens = token_batch(step)
    return model(input_ids=tokens, labels=tokens).loss


def describe(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that attach and detach have to leave or restore."""
    return {
        "modules": {name: (id(module), type(module)) for name, module in model.named_modules()},
        "parameters": {name: (id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)},
        "state": {name: (tuple(t.shape), t.dtype, t.data_ptr()) for name, t in model.state_dict().items()},
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_attach_and_detach_are_a_round_trip(family: str) -> None:
    model = small_model(family)
    first = next(iter(model.parameters()))
    first.requires_grad_(False)  # a parameter that was frozen before stays frozen after
    before, weights = describe(model), snapshot(model)
    with torch.no_grad():
        logits = model(input_ids=token_batch(0)).logits

    assert lift_ds.attach(model, CONFIG) is model
    attached = describe(model)
    new_modules = {principal_of(name) + part for name in expected_names(family) for part in ("", ".index")}
    assert attached["modules"].keys() == before["modules"].keys() | new_modules
    assert all(attached["modules"][name][0] == place for name, (place, _) in before["modules"].items())
    new_keys = {f"{principal_of(name)}.{what}" for name in expected_names(family) for what in ("values", "index.words")}
    assert attached["state"].keys() == before["state"].keys() | new_keys
    assert {key: attached["state"][key] for key in before["state"]} == before["state"]
    with torch.no_grad():
        # GPT-2's bias is added after the product, not inside it: float32's 6e-8 on logits near 1. Others: to the bit.
        tolerance = 1e-5 if family == "gpt2" else 0.0
        torch.testing.assert_close(model(input_ids=token_batch(0)).logits, logits, rtol=0.0, atol=tolerance)

    assert lift_ds.detach(model) is model
    assert describe(model) == before
    assert all(same_bits(weights[name], parameter) for name, parameter in model.named_parameters())
    with torch.no_grad():
        assert same_bits(model(input_ids=token_batch(0)).logits, logits)
    lift_ds.attach(model, CONFIG)  # and again


@pytest.mark.parametrize("family", FAMILIES)
def test_managed_layers_and_their_entries(family: str) -> None:
    model = lift_ds.attach(small_model(family), CONFIG)
    layers = layers_of(model)
    assert layers.keys() == expected_names(family)
    for layer in layers.values():
        assert layer.module is model.get_submodule(layer.full_name.rpartition(".")[0])
        if layer.parameter == "weight":
            assert type(layer.module) is (managed_class(Conv1D, ("weight",)) if family == "gpt2" else LiftLinear)
        else:
            assert isinstance(layer.module, ReadModule)
            assert isinstance(layer.module, MixtralExperts)
        rows, columns = layer.weight.shape[-2:]
        k = layer.weight.numel() // (rows * columns) * min(3 * (rows + columns), rows * columns)
        index = layer.principal_index
        assert index.shape == layer.principal_values.shape == (k,)
        assert index.dtype == torch.int32
        assert torch.equal(layer.principal_values, layer.weight.reshape(-1)[index.long()])
        assert index.tolist() == sorted(set(index.tolist()))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{principal_of(name)}.values" for name in layers}


@pytest.mark.parametrize("family", FAMILIES)
def test_three_steps_change_principal_entries_alone(family: str) -> None:
    model = lift_ds.attach(small_model(family), CONFIG)
    optimizer = lift_ds.LiftAdamW(model, lr=1e-2, weight_decay=0.1)
    before, principal = snapshot(model), index_sets(model)
    losses = []
    for _ in range(3):
        loss = language_loss(model, 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    assert losses[2] < losses[1] < losses[0]  # the same batch three times
    for name, parameter in model.named_parameters():
        changed = changed_positions(before[name], parameter)
        layer_name, kind = name.removesuffix(".weight"), name.rpartition(".")[2]
        if layer_name in principal:
            assert changed <= principal[layer_name], f"{name} changed outside the principal set"
            least = 0.5 if "experts" in name else 0.9  # an expert that saw no token is not trained
            assert len(changed) > least * len(principal[layer_name]), f"{name} was hardly trained"
        elif kind != "values":
            assert not changed, f"{name} is frozen, but changed"


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_in_a_model_are_entries_of_the_dense_gradients(family: str) -> None:
    plain = small_model(family).double()
    model = lift_ds.attach(copy.deepcopy(plain), CONFIG)
    lift_ds.LiftAdamW(model)
    for each in (plain, model):
        language_loss(each, 0).backward()
    for layer in layers_of(model).values():
        dense = plain.get_parameter(layer.full_name).grad
        assert dense is not None
        assert layer.principal_values.grad is not None
        assert layer.weight.grad is None
        # float64 (1e-16), the same products; GPT-2's bias alone is added in another order, which later layers see.
        expected = dense.reshape(-1)[layer.principal_index.long()]
        torch.testing.assert_close(layer.principal_values.grad, expected, rtol=1e-9, atol=1e-14)
        assert expected.abs().max() > 1e-6  # far above that tolerance


def test_conv1d_selects_the_entries_of_its_transposed_matrix() -> None:
    # In float64 selections of different solvers are exactly equal (test_selection.py).
    model = lift_ds.attach(small_model("gpt2").double(), CONFIG)
    for name, layer in layers_of(model).items():
        as_linear = layer.weight.detach().T  # [out, in], as nn.Linear has it
        selected = torch.zeros(as_linear.shape, dtype=torch.bool)
        k = layer.entries()
        selected.view(-1)[sorted_selection(numpy_low_rank(as_linear.contiguous(), 4), k)] = True
        assert selected.T.flatten().nonzero().flatten().tolist() == layer.principal_index.tolist(), name


@pytest.mark.parametrize("family", ["gemma", "gpt2"])
def test_tied_head_is_neither_managed_nor_broken(family: str) -> None:
    model = small_model(family)
    embedding = model.get_input_embeddings().weight
    assert model.lm_head.weight is embedding
    lift_ds.attach(model, CONFIG)
    assert model.lm_head.weight is embedding
    assert type(model.lm_head) is nn.Linear
    assert not embedding.requires_grad
    lift_ds.detach(model)
    assert model.lm_head.weight is embedding
    assert embedding.requires_grad


def names_managed(target_modules: Any, model: nn.Module | None = None) -> set[str]:
    config = lift_ds.LiftConfig(budget_rank=2, lra_rank=2, target_modules=target_modules)
    return set(layers_of(lift_ds.attach(model or small_model("llama"), config)))


@pytest.mark.parametrize(
    ("target_modules", "endings"),
    [
        (None, ATTENTION + MLP),
        ("LIFT_MLP", MLP),
        (["q_proj", "down_proj"], ("self_attn.q_proj", "mlp.down_proj")),
        (["self_attn.q_proj"], ("self_attn.q_proj",)),
    ],
)
def test_targets(target_modules: Any, endings: tuple[str, ...]) -> None:
    assert names_managed(target_modules) == {f"model.layers.{i}.{name}" for i in range(2) for name in endings}


@pytest.mark.parametrize(
    ("target_modules", "name"),
    [
        (["1.mlp.up_proj"], "model.layers.1.mlp.up_proj"),
        (["model.layers.0.self_attn.k_proj"], "model.layers.0.self_attn.k_proj"),
    ],
)
def test_target_of_one_layer(target_modules: list[str], name: str) -> None:
    assert names_managed(target_modules) == {name}


@pytest.mark.parametrize(
    ("target_modules", "message"),
    [
        (["q_prj"], "no matrix of LlamaForCausalLM is named 'q_prj'; did you mean 'q_proj'"),
        (["proj"], "is named 'proj'"),  # whole components only
        (["q_proj", "wqkv"], "is named 'wqkv'.*there are down_proj, gate_proj, k_proj"),
        (["lm_head"], "lm_head is the output head"),
        (["embed_tokens"], "is named 'embed_tokens'"),
    ],
)
def test_target_that_matches_nothing_is_refused(target_modules: list[str], message: str) -> None:
    model = small_model("llama")
    before = describe(model)
    with pytest.raises(ValueError, match=message):
        names_managed(target_modules, model)
    assert describe(model) == before


def test_preset_without_a_match_is_refused() -> None:
    with pytest.raises(ValueError, match="'LIFT_MLP': no matrix of GPT2LMHeadModel is named 'gate_proj'"):
        names_managed("LIFT_MLP", small_model("gpt2"))


@pytest.mark.parametrize("family", ["gemma", "gpt2"])
def test_tied_head_as_a_target_is_refused(family: str) -> None:
    with pytest.raises(ValueError, match="lm_head is the output head or shares its weight with an embedding"):
        names_managed(["lm_head"], small_model(family))


@pytest.mark.parametrize(
    "model",
    [nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4)), nn.ModuleDict({"lm_head": nn.Linear(4, 5)})],
    ids=["no linear layer", "only a head"],
)
def test_model_without_a_layer_to_manage_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=f"{type(model).__name__} has no layer LIFT can manage"):
        lift_ds.attach(model, CONFIG)


def test_layers_of_another_kind_are_named() -> None:
    class QuantisedLinear(nn.Linear):
        pass

    layer = QuantisedLinear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="not QuantisedLinear"):
        lift_ds.attach(nn.Sequential(layer), CONFIG)


def test_attach_twice_and_detach_without_attach_are_refused() -> None:
    model = build("matrices")
    with pytest.raises(ValueError, match="not attached to this Matrices"):
        lift_ds.detach(model)
    with pytest.raises(ValueError, match="not attached to this Matrices"):
        lift_ds.LiftAdamW(model)
    lift_ds.attach(model, CONFIG)
    before = describe(model)
    with pytest.raises(ValueError, match="attached to this Matrices already"):
        lift_ds.attach(model, CONFIG)
    with pytest.raises(ValueError, match="already"):  # a wrapper of it, too
        lift_ds.attach(nn.Sequential(model), CONFIG)
    assert describe(model) == before
    lift_ds.detach(model)
    with pytest.raises(ValueError, match="not attached"):
        lift_ds.detach(model)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_names_its_matrix_and_leaves_the_model_alone(bad: float) -> None:
    model = small_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2, 3] = bad  # others come before it
    before, weights = describe(model), snapshot(model)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: .*NaN or infinite"):
        lift_ds.attach(model, CONFIG)
    assert describe(model) == before
    assert all(same_bits(weights[name], parameter) for name, parameter in model.named_parameters())
    assert attachment_of(model) is None


@pytest.mark.parametrize(
    ("family", "extra", "count"),
    [
        ("llama", ("norm.weight",), 1),  # the last norm alone: whole components
        ("llama", ("input_layernorm.weight", "post_attention_layernorm.weight", "norm.weight"), 5),
        ("llama", ("0.input_layernorm.weight",), 1),
        ("qwen2", ("bias",), 6),  # q, k, v of two layers
        ("qwen2", ("q_proj.bias",), 2),
        ("gpt2", ("bias",), 2 * 6 + 1),  # two norms and four layers each, and the last norm
        ("llama", ("lm_head.weight",), 1),
    ],
)
def test_extra_parameters_are_trained_densely(
    family: str, extra: tuple[str, ...], count: int, lift_log: list[str]
) -> None:
    config = lift_ds.LiftConfig(budget_rank=2, lra_rank=2, extra_trainable=extra)
    model = lift_ds.attach(small_model(family), config)
    assert f"; {count} more parameters trained densely" in lift_log[0]
    before = snapshot(model)
    optimizer = lift_ds.LiftAdamW(model, lr=1e-2)
    language_loss(model, 0).backward()
    optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if changed_positions(before[name], parameter)}
    dense = {name for name in changed if name.removesuffix(".weight") not in layers_of(model)}
    dense = {name for name in dense if not name.endswith("principal.values")}
    assert len(dense) == count
    assert all(any(name.endswith("." + pattern) or name == pattern for pattern in extra) for name in dense)


def test_weight_decay_falls_on_dense_matrices_not_on_vectors() -> None:
    config = lift_ds.LiftConfig(
        budget_rank=2, lra_rank=2, extra_trainable=("norm.weight", "lm_head.weight", "q_proj.bias")
    )
    model = lift_ds.attach(small_model("qwen2"), config)
    optimizer = lift_ds.LiftAdamW(model, weight_decay=0.1)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    by_name = {name: decay[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, value in by_name.items() if value == 0.0} == {
        "model.norm.weight", "model.layers.0.self_attn.q_proj.bias", "model.layers.1.self_attn.q_proj.bias"
    }  # fmt: skip
    assert {value for value in by_name.values() if value} == {0.1}
    assert by_name["lm_head.weight"] == 0.1


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("q_proj.weight", r"matches model\.layers\.0\.self_attn\.q_proj\.weight, which LIFT manages already"),
        ("weight", "which LIFT manages already"),
        ("nrom.weight", "'nrom.weight' matches no parameter; did you mean 'norm.weight'"),
        ("layernorm.weight", "matches no parameter"),  # whole components only
    ],
)
def test_bad_extra_parameter_is_refused(extra: str, message: str) -> None:
    model = small_model("llama")
    before = describe(model)
    with pytest.raises(ValueError, match=message):
        lift_ds.attach(model, lift_ds.LiftConfig(budget_rank=2, extra_trainable=(extra,)))
    assert describe(model) == before


@pytest.mark.parametrize("target_modules", [None, ["first"], ["second"], ["first", "second"]])
def test_shared_weight_is_refused(target_modules: list[str] | None) -> None:
    """Also where only one of the two layers is a target: its gradient would lack what the other contributes."""
    model = nn.ModuleDict({"first": nn.Linear(6, 6), "second": nn.Linear(6, 6), "third": nn.Linear(6, 6)})
    model["second"].weight = model["first"].weight
    before = describe(model)
    with pytest.raises(ValueError, match=r"(first and second|second and first) share one weight"):
        lift_ds.attach(model, lift_ds.LiftConfig(budget_rank=1, lra_rank=2, target_modules=target_modules))
    assert describe(model) == before
    assert names_managed(["third"], model) == {"third"}


def test_module_used_twice_is_managed_once() -> None:
    """A module in two places is one layer; its gradient is the sum of both uses."""
    torch.manual_seed(3)
    shared = nn.Linear(6, 6, bias=False)
    plain = nn.Sequential(shared, nn.Tanh(), shared)
    model = lift_ds.attach(copy.deepcopy(plain), lift_ds.LiftConfig(density=0.5, lra_rank=2))
    lift_ds.LiftAdamW(model)
    for each in (plain, model):
        each(torch.ones(2, 6)).sin().sum().backward()
    (layer,) = layers_of(model).values()
    assert shared.weight.grad is not None
    expected = shared.weight.grad.reshape(-1)[layer.principal_index.long()]
    # float32, two sums.
    torch.testing.assert_close(layer.principal_values.grad, expected, rtol=1e-5, atol=1e-6)


def test_what_is_left_out_is_named_where_it_is_much(lift_log: list[str]) -> None:
    lift_ds.attach(small_model("mixtral"), CONFIG)
    assert not [line for line in lift_log if "left frozen" in line]  # routers and norms
    (headline,) = [line for line in lift_log if "LIFT manages" in line]
    model = small_model("mixtral")
    beside = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and "lm_head" not in name)
    frozen = sum(p.numel() for name, p in model.named_parameters() if "norm" in name or "gate.weight" in name)
    assert f"the matrices are {100 * (1 - frozen / beside):.2f}% of what is no embedding or head" in headline

    lift_log.clear()
    odd = nn.ModuleDict({"layer": nn.Linear(8, 8, bias=False), "table": nn.ParameterList([torch.ones(4, 4)])})
    lift_ds.attach(odd, CONFIG)
    (warning,) = [line for line in lift_log if "left frozen" in line]
    assert warning == "WARNING not managed by LIFT, left frozen: table.0 [4, 4]"


def test_routers_are_managed_by_name_alone(lift_log: list[str]) -> None:
    assert names_managed(["mlp.gate"], small_model("mixtral")) == {f"model.layers.{layer}.mlp.gate" for layer in (0, 1)}


def test_a_preset_takes_stacks_of_experts_too() -> None:
    names = names_managed("LIFT_MLP", small_model("mixtral"))
    stacks = ("gate_up_proj", "down_proj")
    assert names == {f"model.layers.{layer}.mlp.experts.{name}" for layer in (0, 1) for name in stacks}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gpt2"])
def test_nothing_is_reported_frozen_where_all_matrices_are_managed(family: str, lift_log: list[str]) -> None:
    lift_ds.attach(small_model(family), CONFIG)
    assert [line for line in lift_log if not line.startswith("INFO")] == []


def test_log_says_how_much_is_managed(lift_log: list[str]) -> None:
    lift_ds.attach(Matrices(), lift_ds.LiftConfig(budget_rank=2, lra_rank=10, refresh_interval=7))
    total = 48 * 12 + 10 * 60 + 32 * 32 + 8 * 8
    entries = 2 * (60 + 70 + 64 + 16)
    assert lift_log == [
        f"INFO LIFT manages 4 matrices, {entries} of {total:,} entries ({100 * entries / total:.2f}%); budget_rank 2, "
        f"lra_rank 10, refresh every 7 steps; {100 * entries / total:.2f}% of all {total:,} parameters; "
        "the matrices are 100.00% of what is no embedding or head",
        # wide [10, 60] and whole [8, 8].
        "INFO lra_rank 10 is not below the smaller side of 2 of them: there W' = W",
    ]


def test_attach_before_the_ranks_have_met_is_said(lift_log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    lift_ds.attach(build("llama"), lift_ds.LiftConfig(density=0.1))
    assert "each of the 2 ranks selects in all matrices" in "".join(lift_log)


def test_without_a_selection_nothing_is_trained_until_a_state_dict_brings_it() -> None:
    config = lift_ds.LiftConfig(density=0.1, lra_rank=4)
    selected = lift_ds.attach(build("llama"), config)
    model = lift_ds.attach(build("llama"), config, resume=True)
    tokens = token_batch(0)
    with pytest.raises(RuntimeError, match="nothing is selected"):
        model(input_ids=tokens, labels=tokens)
    model.load_state_dict(selected.state_dict())
    lift_ds.LiftAdamW(model)
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(
        torch.equal(one.principal_index, layers_of(selected)[name].principal_index)
        for name, one in layers_of(model).items()
    )


def test_log_says_nothing_of_full_rank_where_there_is_none(lift_log: list[str]) -> None:
    lift_ds.attach(Matrices(), lift_ds.LiftConfig(density=0.125, lra_rank=7, refresh_interval=7))
    (line,) = lift_log
    assert "283 of 2,264 entries (12.50%); density 0.125, lra_rank 7" in line


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_values_are_their_own_float32_master(dtype: torch.dtype) -> None:
    model = lift_ds.attach(small_llama(dtype), CONFIG)
    for layer in layers_of(model).values():
        assert layer.weight.dtype == dtype
        assert layer.principal_values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_copy_of_an_attached_model_stands_alone() -> None:
    model = lift_ds.attach(build("matrices"), CONFIG)
    twin = copy.deepcopy(model)
    lift_ds.detach(model)
    layers = layers_of(twin)
    assert all(layer.module is twin.get_submodule(name) for name, layer in layers.items())
    lift_ds.detach(twin)
    assert type(twin.get_submodule("tall")) is nn.Linear


def test_detach_leaves_nothing_of_lift_on_the_modules() -> None:
    model = lift_ds.attach(build("matrices"), CONFIG)
    lift_ds.detach(model)
    assert not any("principal" in name or "lift" in name for m in model.modules() for name in vars(m))
    assert attachment_of(model) is None


def test_what_a_saved_model_leaves_out_is_forgotten_by_detach() -> None:
    model = lift_ds.attach(small_model("llama"), CONFIG)
    model._keys_to_ignore_on_save = {"of.its.own"}
    leave_out_of_saved_models(model)
    left_out = {name for name in model.state_dict() if ".principal." in name}
    assert model._keys_to_ignore_on_save == {"of.its.own"} | left_out
    assert left_out
    lift_ds.detach(model)
    assert model._keys_to_ignore_on_save == {"of.its.own"}


def test_a_model_on_the_meta_device_is_attached_to_for_its_layout_alone() -> None:
    with torch.device("meta"):
        dry = dry_attach(Matrices(), CONFIG)
    real = lift_ds.attach(Matrices(), CONFIG)
    assert {name: p.shape for name, p in dry.named_parameters()} == {
        name: p.shape for name, p in real.named_parameters()
    }
    assert all(parameter.is_meta for parameter in dry.parameters())
    with pytest.raises(ValueError, match=r"is on cpu; lift_ds\.attach selects"):
        dry_attach(Matrices(), CONFIG)
