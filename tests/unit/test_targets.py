"""Pins what is trained besides the plain rule "every linear layer": what the user has frozen stays frozen unless it is
named, `exclude_modules` leaves out, a new head is trained densely; each of these is said.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import VOCABULARY, small_llama, token_batch
from helpers import layers_of, same_bits, snapshot, train
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import lift_ds


def settings(**changes: Any) -> lift_ds.LiftConfig:
    return lift_ds.LiftConfig(budget_rank=1, lra_rank=2, **changes)


TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def seeing_llama() -> LlavaForConditionalGeneration:
    """A small LLaVA, its vision tower frozen as one does."""
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    torch.manual_seed(3)
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **vision},
        text_config={"model_type": "llama", **TEXT},
        image_token_index=5,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.requires_grad_(False)
    return model


def in_tower(names: Any) -> set[str]:
    return {name for name in names if "vision_tower" in name}


def said(log: list[str], words: str) -> list[str]:
    return [line for line in log if words in line]


@pytest.mark.parametrize("target_modules", [None, "LIFT_MLP"])
def test_what_was_frozen_stays_frozen_and_is_said(target_modules: str | None, lift_log: list[str]) -> None:
    model = seeing_llama()
    assert model.model.language_model.layers[0].mlp.gate_proj.weight.requires_grad
    model.model.language_model.layers[0].requires_grad_(False)
    lift_ds.attach(model, settings(target_modules=target_modules))
    layers = layers_of(model)
    assert layers
    assert not in_tower(layers)
    assert not any("language_model.layers.0." in name for name in layers)
    (line,) = said(lift_log, "had been frozen (requires_grad is False) and stay so")
    assert line.startswith("WARNING")
    assert not said(lift_log, "not managed by LIFT, left frozen: model.vision_tower.vision_model.encoder.layers")


def test_a_frozen_part_does_not_change_in_training() -> None:
    model = small_llama()
    model.model.layers[0].requires_grad_(False)
    lift_ds.attach(model, settings(refresh_interval=2))
    before = snapshot(model)
    train(model, lift_ds.LiftAdamW(model, lr=1e-2), "llama", range(4))
    after = dict(model.named_parameters())
    moved = {name for name in before if "principal" not in name and not same_bits(before[name], after[name])}
    assert moved
    assert all(name.startswith("model.layers.1.") for name in moved)


def test_a_frozen_layer_that_is_named_is_managed_with_a_word(lift_log: list[str]) -> None:
    model = lift_ds.attach(seeing_llama(), settings(target_modules=("q_proj",)))
    assert len(in_tower(layers_of(model))) == 2
    (line,) = said(lift_log, "and are managed, since target_modules names them")
    assert line.startswith("WARNING 2 layers (model.vision_tower.")


def test_a_model_that_is_frozen_as_a_whole_is_refused() -> None:
    model = small_llama().requires_grad_(False)
    with pytest.raises(ValueError, match=r"all 14 layers of LlamaForCausalLM .* are frozen .*requires_grad_\(True\)"):
        lift_ds.attach(model, settings())
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("excluded", "left"),
    [
        (("layers.0",), {f"model.layers.1.{name}" for name in ("self_attn.q_proj", "mlp.up_proj")}),
        (("self_attn",), {f"model.layers.{i}.mlp.up_proj" for i in (0, 1)}),
        (("q_proj", "model.layers.1.mlp"), {"model.layers.0.mlp.up_proj"}),
    ],
)
def test_excluded_modules_are_left_out_with_all_below(excluded: tuple[str, ...], left: set[str]) -> None:
    model = lift_ds.attach(small_llama(), settings(exclude_modules=excluded))
    assert {name for name in layers_of(model) if name.endswith(("q_proj", "up_proj"))} == left


def test_a_target_that_is_excluded_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"target_modules name 'q_proj' matches only layers that exclude_modules leaves"
    ):
        lift_ds.attach(small_llama(), settings(target_modules=("q_proj", "up_proj"), exclude_modules=("self_attn",)))


@pytest.mark.parametrize("excluded", ["self_atn", "proj", "layers.7"])
def test_an_excluded_name_that_matches_nothing_is_refused(excluded: str) -> None:
    """Whole components only; the nearest one is suggested."""
    hint = "; did you mean 'self_attn'" if excluded == "self_atn" else ""
    with pytest.raises(ValueError, match=f"exclude_modules name {excluded!r} matches no module{hint}"):
        lift_ds.attach(small_llama(), settings(exclude_modules=(excluded,)))


def classifier(kind: str) -> Any:
    """A decoder or an encoder with a new head, of one matrix or of two."""
    torch.manual_seed(4)
    if kind == "llama":
        return LlamaForSequenceClassification(LlamaConfig(**TEXT, num_labels=2))
    return RobertaForSequenceClassification(RobertaConfig(**{**TEXT, "max_position_embeddings": 70}, num_labels=3))


HEADS = {
    "llama": ("score", {"score.weight"}),
    "roberta": (
        "classifier",
        {f"classifier.{layer}.{what}" for layer in ("dense", "out_proj") for what in ("weight", "bias")},
    ),
}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("extra", [(), "head"])
def test_a_new_head_is_trained_densely_and_said(kind: str, extra: Any, lift_log: list[str]) -> None:
    """Whether it is named in `extra_trainable` or not."""
    head, parameters = HEADS[kind]
    model = lift_ds.attach(classifier(kind), settings(extra_trainable=(head,) if extra else ()))
    dense = {name for name, p in model.named_parameters() if p.requires_grad and "principal" not in name}
    assert dense == parameters
    assert not any(name.startswith(head) for name in layers_of(model))
    assert said(lift_log, f"the new head {head} is trained densely")
    assert f"; {len(parameters)} more parameters trained densely" in lift_log[0]


def test_all_entries_of_a_new_head_move() -> None:
    model = lift_ds.attach(classifier("llama"), settings())
    optimizer = lift_ds.LiftAdamW(model, lr=1e-2)
    before = model.score.weight.detach().clone()
    for step in range(2):
        model(input_ids=token_batch(step), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
        optimizer.step()
    assert bool((model.score.weight != before).all())


@pytest.mark.parametrize("how", ["frozen", "excluded"])
def test_a_head_that_is_frozen_or_excluded_is_left_alone(how: str) -> None:
    model = classifier("roberta")
    if how == "frozen":
        model.classifier.requires_grad_(False)
    lift_ds.attach(model, settings(exclude_modules=("classifier",) if how == "excluded" else ()))
    assert not any(p.requires_grad for name, p in model.named_parameters() if "classifier" in name)
    assert not any("classifier" in name for name in layers_of(model))


def test_a_head_that_is_a_target_is_managed_sparsely() -> None:
    model = lift_ds.attach(classifier("llama"), settings(target_modules=("score", "q_proj")))
    assert "score" in layers_of(model)
    assert not model.score.weight.requires_grad


def test_a_head_inside_a_model_is_a_layer_like_others() -> None:
    """Only the model's own children can be new heads: `mlp.classifier` may be anything."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = nn.Linear(6, 4)

    model = lift_ds.attach(nn.Sequential(Block(), nn.Linear(4, 5)), settings())
    assert set(layers_of(model)) == {"0.classifier", "1"}


def test_large_shares_are_said_with_what_to_set(lift_log: list[str]) -> None:
    lift_ds.attach(small_llama(), lift_ds.LiftConfig(budget_rank=16, lra_rank=2))
    (line,) = said(lift_log, "of these matrices, since they are small")
    # 16 (m + n) entries of each, and not more than there are: all of the attention, 1,792 of 2,560 of the others.
    assert line.startswith("WARNING budget_rank 16 trains 78.6% of these matrices")
    assert "density 0.05 (or budget_rank 1)" in line


@pytest.mark.parametrize("config", [{"density": 0.5}, {"budget_rank": 2}], ids=str)
def test_a_share_that_was_asked_for_or_is_small_is_not_warned_of(config: Any, lift_log: list[str]) -> None:
    lift_ds.attach(small_llama(), lift_ds.LiftConfig(lra_rank=2, **config))
    assert [line for line in lift_log if line.startswith("WARNING")] == []


def test_shared_blocks_can_be_left_out() -> None:
    """Zamba2 runs one transformer block at several places of the model."""
    from transformers import Zamba2Config, Zamba2ForCausalLM

    torch.manual_seed(5)
    model = Zamba2ForCausalLM(
        Zamba2Config(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48,
            layers_block_type=["mamba", "hybrid", "mamba", "hybrid"], mamba_d_state=8, n_mamba_heads=2, mamba_ngroups=1,
            mamba_headdim=32, num_mem_blocks=1, attention_head_dim=16, chunk_size=8, use_mem_rope=False,
            adapter_rank=4, use_shared_attention_adapter=False,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"share one weight.* exclude_modules"):
        lift_ds.attach(model, settings())
    lift_ds.attach(model, settings(exclude_modules=("shared_transformer",)))
    names = layers_of(model)
    assert names
    assert not any("shared_transformer" in name for name in names)
    optimizer = lift_ds.LiftAdamW(model, lr=1e-2)
    model(input_ids=token_batch(0), labels=token_batch(0)).loss.backward()
    optimizer.step()
