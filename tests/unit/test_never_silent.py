"""Pins that LIFT is active and does what its log says, or the run stops with a sentence: matrices that no gradient
reaches, weights loaded by themselves, a model cast or made trainable in the middle, optimizers that are not Adam.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import VOCABULARY, small_llama, token_batch
from helpers import layers_of, same_bits, train
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM

import lift_ds

CONFIG = lift_ds.LiftConfig(density=0.2, lra_rank=2, refresh_interval=2)


def untrained(log: list[str]) -> list[str]:
    return [line for line in log if "no gradient has reached" in line]


class Partly(nn.Module):
    """Of five layers one is never called, one's weight is read without calling it, and one comes in from step 3 on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"called": nn.Linear(8, 8), "read": nn.Linear(8, 8)}) for _ in range(2)
        )
        self.late, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        for block in self.blocks:
            x = nn.functional.linear(block["called"](x), block["read"].weight)
        return (self.late(x) if self.step > 2 else x).square().mean()


def train_partly(model: nn.Module, steps: int) -> None:
    optimizer = lift_ds.LiftAdamW(model, lr=1e-2)
    for step in range(steps):
        model(torch.randn(4, 8, generator=torch.Generator().manual_seed(step))).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_matrices_that_no_gradient_reaches_are_named_once_and_again_where_it_lasts(lift_log: list[str]) -> None:
    train_partly(lift_ds.attach(Partly(), CONFIG), 9)
    first, second = untrained(lift_log)
    assert "WARNING after step 1 no gradient has reached 4 of 6 managed weights, which are not trained: " in first
    assert "blocks.*.read x 2, late, idle. " in first
    assert "exclude_modules" in first
    # After the first refresh; `late` has had its first gradient in the third step.
    assert "after step 2 no gradient has reached 4 of 6" in second


def test_where_it_does_not_last_it_is_said_once(lift_log: list[str]) -> None:
    config = lift_ds.LiftConfig(density=0.2, lra_rank=2, refresh_interval=4, exclude_modules=("read", "idle"))
    train_partly(lift_ds.attach(Partly(), config), 9)
    (line,) = untrained(lift_log)
    assert "1 of 3 managed weights" in line


def test_nothing_is_said_where_all_are_reached(lift_log: list[str]) -> None:
    model = lift_ds.attach(small_llama(), CONFIG)
    train(model, lift_ds.LiftAdamW(model), "llama", range(3))
    assert untrained(lift_log) == []


def test_a_weight_that_mamba_reads_without_calling_its_layer_is_trained(lift_log: list[str]) -> None:
    torch.manual_seed(9)
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=4)
    plain = MambaForCausalLM(config).double()
    model = lift_ds.attach(copy.deepcopy(plain), CONFIG)
    optimizer = lift_ds.LiftAdamW(model)
    for each in (plain, model):
        each(input_ids=token_batch(0), labels=token_batch(0)).loss.backward()
    for name in ("dt_proj", "conv1d"):
        weight = layers_of(model)[f"backbone.layers.1.mixer.{name}"]
        dense = plain.get_parameter(weight.full_name).grad
        assert dense is not None
        expected = dense.reshape(-1)[weight.principal_index.long()]
        # float64, the same operators.
        torch.testing.assert_close(weight.principal_values.grad, expected, rtol=1e-6, atol=1e-18)
        assert expected.abs().max() > 1e-9
    optimizer.step()
    assert untrained(lift_log) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_loaded_by_themselves_stay(dtype: torch.dtype) -> None:
    """The next step moves the principal entries from where they were loaded, not back to where they had been."""
    torch.manual_seed(10)
    other = {name: p + 0.5 * torch.randn_like(p) for name, p in small_llama(dtype).state_dict().items()}
    model = lift_ds.attach(small_llama(dtype), CONFIG)
    optimizer = lift_ds.LiftAdamW(model, lr=1e-3)
    train(model, optimizer, "llama", range(1))
    missing, unexpected = model.load_state_dict(other, strict=False)
    assert len(missing) == 28
    assert not unexpected
    for name, layer in layers_of(model).items():
        assert same_bits(layer.weight, other[f"{name}.weight"])
        assert layer.holds_its_values(layer.principal.index.compact())
    train(model, optimizer, "llama", range(1, 2))
    for name, layer in layers_of(model).items():
        # Adam's second step is at most some four times the learning rate, and bfloat16 rounds by 1 / 256 of the weight.
        assert float((layer.weight.float() - other[f"{name}.weight"].float()).abs().max()) < (
            0.005 if dtype == torch.float32 else 0.02
        )


def test_values_that_a_weight_was_rounded_from_are_kept() -> None:
    """Loading the very weights that are there loses nothing of the float32 values."""
    model = lift_ds.attach(small_llama(torch.bfloat16), CONFIG)
    train(model, lift_ds.LiftAdamW(model, lr=1e-3), "llama", range(2))
    before = {name: layer.principal_values.detach().clone() for name, layer in layers_of(model).items()}
    plain = {name: p.clone() for name, p in model.state_dict().items() if "principal" not in name}
    model.load_state_dict(plain, strict=False)
    assert all(same_bits(layer.principal_values, before[name]) for name, layer in layers_of(model).items())


def test_a_whole_state_dict_loads_as_it_was_saved() -> None:
    model = lift_ds.attach(small_llama(), CONFIG)
    train(model, lift_ds.LiftAdamW(model, lr=1e-3), "llama", range(3))
    saved = copy.deepcopy(model.state_dict())
    other = lift_ds.attach(small_llama(), CONFIG)
    other.load_state_dict(saved)
    assert all(same_bits(other.state_dict()[key], value) for key, value in saved.items())


def test_turning_on_gradients_for_everything_is_refused() -> None:
    for turn_on in (
        lambda m: m.requires_grad_(True),
        lambda m: [setattr(p, "requires_grad", True) for p in m.parameters()],
    ):
        with pytest.raises(
            ValueError, match=r"requires_grad was turned on for all .*before lift_ds\.attach.*extra_train"
        ):
            turn_on(lift_ds.attach(small_llama(), CONFIG))


def test_a_model_that_is_cast_after_a_step_is_refused() -> None:
    model = lift_ds.attach(small_llama(), CONFIG)
    optimizer = lift_ds.LiftAdamW(model)
    train(model, optimizer, "llama", range(1))
    model.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"cast to torch\.bfloat16 after its first step.*before lift_ds\.attach"):
        train(model, optimizer, "llama", range(1, 2))


def test_a_model_may_be_cast_before_its_first_step() -> None:
    model = lift_ds.attach(small_llama(), CONFIG)
    model.to(torch.bfloat16)
    train(model, lift_ds.LiftAdamW(model), "llama", range(3))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda p: torch.optim.Adafactor(p), "Adafactor"),
        (lambda p: torch.optim.SGD(p, momentum=0.9), "SGD"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "AdamW with amsgrad"),
    ],
)
def test_an_optimizer_whose_states_are_not_adams_is_refused(make: Any, kind: str) -> None:
    model = lift_ds.attach(small_llama(), CONFIG)
    with pytest.raises(ValueError, match=f"the optimizer is {kind}: LIFT carries Adam's two moments"):
        lift_ds.bind(model, make([p for p in model.parameters() if p.requires_grad]))


def test_an_optimizer_built_in_vain_is_told_with_what_works_instead(lift_log: list[str]) -> None:
    """Not every trainer takes `optimizer_cls_and_kwargs`; its own AdamW does as well."""
    model = lift_ds.attach(small_llama(), CONFIG)
    lift_ds.LiftAdamW(model)
    lift_ds.bind(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.25))
    (line,) = [line for line in lift_log if "a LiftAdamW was built" in line]
    assert "AdamW trains it, by settings of its own: lr 0.25, betas (0.9, 0.999)" in line
    assert "set learning_rate, adam_beta1 and adam_beta2" in line


def test_a_copy_is_a_model_of_its_own() -> None:
    """It evaluates by its own weights, compiled too, and refers to no optimizer of the original."""
    model = lift_ds.attach(small_llama(), CONFIG)
    train(model, lift_ds.LiftAdamW(model, lr=1e-2), "llama", range(3))
    twin = copy.deepcopy(model)
    assert layers_of(twin).keys() == layers_of(model).keys()
    for mine, its in zip(layers_of(model).values(), layers_of(twin).values(), strict=True):
        assert its is not mine
        assert int(its.module.lift_handle) != int(mine.module.lift_handle)
    train(twin, lift_ds.LiftAdamW(twin, lr=1e-2), "llama", range(3))
    assert not same_bits(twin.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)
