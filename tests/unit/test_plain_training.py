"""Training with attach + LiftAdamW in plain PyTorch keeps the invariants of the design:

1. a step changes no weight outside the principal set, to the bit;
2. after `optimizer.step()` W holds the trained values;
4. refreshes are counted in applied steps: not micro-batches, not steps skipped for overflow;
5. save, stop, resume continues to the bit, just before and just after a refresh too;
6. if LIFT is not really active the run stops with an error.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import build, loss_of
from helpers import applied_steps, changed_positions, index_sets, layers_of, same_bits, snapshot, train
from torch import nn
from torch.utils.checkpoint import checkpoint

import lift_ds
from lift_ds.refresh.driver import APPLIED_STEPS
from lift_ds.zero.bind import bind

CONFIG = lift_ds.LiftConfig(budget_rank=3, lra_rank=3, refresh_interval=3)
#: Large enough that a refresh after three steps replaces entries in every matrix but those trained whole.
LR = 1e-2


def prepared(
    kind: str = "matrices", config: lift_ds.LiftConfig = CONFIG, dtype: torch.dtype = torch.float32, **settings: Any
) -> tuple[nn.Module, lift_ds.LiftAdamW]:
    model = lift_ds.attach(build(kind, dtype), config)
    return model, lift_ds.LiftAdamW(model, **{"lr": LR, "weight_decay": 0.1, **settings})


def weights_hold_the_values(model: nn.Module) -> bool:
    return all(
        same_bits(layer.weight.reshape(-1)[layer.principal_index.long()], layer.principal_values.to(layer.weight.dtype))
        for layer in layers_of(model).values()
    )


@pytest.mark.parametrize(
    ("kind", "dtype"), [("llama", torch.float32), ("llama", torch.bfloat16), ("matrices", torch.float32)]
)
def test_every_step_changes_principal_entries_alone_and_writes_them_back(kind: str, dtype: torch.dtype) -> None:
    model, optimizer = prepared(kind, dtype=dtype)
    first = index_sets(model)
    for step in range(7):
        before, principal = snapshot(model), index_sets(model)  # the set in force during this step
        train(model, optimizer, kind, range(step, step + 1))
        for name, layer in layers_of(model).items():
            changed = changed_positions(before[f"{name}.weight"], layer.weight)
            assert changed, f"{name} was not trained in step {step}"
            assert changed <= principal[name], f"{name} changed outside the principal set in step {step}"
        assert weights_hold_the_values(model), f"after step {step}"
        for name, parameter in model.named_parameters():
            if name.rsplit(".", 1)[0] not in principal and ".principal." not in name:
                assert same_bits(before[name], parameter), f"{name} is frozen, but changed in step {step}"
        if (step + 1) % 3:
            assert index_sets(model) == principal, f"the selection changed in step {step}, where no refresh is due"
    assert index_sets(model) != first, "no refresh replaced an entry: the test shows nothing of a refresh"


def test_refresh_selects_from_the_trained_weights_and_reports_churn(lift_log: list[str]) -> None:
    model, optimizer = prepared()
    assert optimizer.driver is not None
    before = index_sets(model)
    train(model, optimizer, "matrices", range(2))
    assert optimizer.driver.reports == []
    train(model, optimizer, "matrices", range(2, 3))
    after = index_sets(model)
    for name, layer in layers_of(model).items():
        selected = lift_ds.principal_indices(layer.weight.detach(), k=layer.entries(), lra_rank=3)
        assert after[name] == set(selected.tolist())
    (report,) = optimizer.driver.reports
    entries = sum(len(index) for index in after.values())
    replaced = sum(len(after[name] - before[name]) for name in after)
    assert replaced > 0
    assert (report.step, report.matrices, report.entries) == (3, 4, entries)
    assert report.churn == replaced / entries
    assert report.seconds > 0
    assert lift_log[-1].startswith(
        f"INFO LIFT refresh at step 3: 4 matrices, {entries} entries, churn {report.churn:.1%}"
    )


def test_survivors_of_a_refresh_keep_their_moments_newcomers_have_none() -> None:
    model, optimizer = prepared()
    layers = layers_of(model)
    train(model, optimizer, "matrices", range(2))

    old: dict[str, dict[int, tuple[float, float, float]]] = {}

    def keep(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        old.update({name: by_position(name) for name in layers})

    def by_position(name: str) -> dict[int, tuple[float, float, float]]:
        values = layers[name].principal_values
        moments = optimizer.state[values]
        columns = (values, moments["exp_avg"], moments["exp_avg_sq"])
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return dict(zip(layers[name].principal_index.tolist(), rows, strict=True))

    # Hooks run in the order of their registration: this one after LIFT's, unless it is moved before it.
    handle = optimizer.register_step_post_hook(keep)
    optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)
    train(model, optimizer, "matrices", range(2, 3))

    newcomers = 0
    for name, layer in layers.items():
        for position, row in by_position(name).items():
            newcomers += position not in old[name]
            assert row == old[name].get(position, (layer.weight.view(-1)[position].item(), 0.0, 0.0))
        assert optimizer.state[layer.principal_values]["step"] == 3  # the count for bias correction goes on
    assert newcomers > 0


def test_micro_batches_do_not_count_and_add_up() -> None:
    model, optimizer = prepared()
    twin, twin_optimizer = prepared()
    for step in range(4):
        for part in (slice(0, 2), slice(2, 4)):
            (loss_of(model, "matrices", step, part) / 2).backward()
        assert applied_steps(optimizer) == step
        optimizer.step()
        optimizer.zero_grad()
    assert applied_steps(optimizer) == 4
    assert optimizer.driver is not None
    assert [report.step for report in optimizer.driver.reports] == [3]
    train(twin, twin_optimizer, "matrices", range(4))
    for name, layer in layers_of(model).items():
        # The mean of two halves instead of one mean: float32's 6e-8, which Adam turns into a share of lr = 1e-2 where a
        # gradient is near zero.
        torch.testing.assert_close(layer.weight, layers_of(twin)[name].weight, rtol=0.0, atol=1e-4)


def _trainers_own(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, fused=False)
    bind(model, optimizer)
    return optimizer


@pytest.mark.parametrize(
    "make", [lambda model: lift_ds.LiftAdamW(model, lr=LR), _trainers_own], ids=["LiftAdamW (fused)", "AdamW"]
)
def test_steps_skipped_by_a_grad_scaler_do_not_count(make: Callable[[nn.Module], Any]) -> None:
    """GradScaler does not call `step` after an overflow, but for a fused kernel, which it tells to skip."""
    model = lift_ds.attach(build("matrices"), CONFIG)
    optimizer = make(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    overflows = {1, 2, 4}
    for step in range(6):
        before, count = snapshot(model), optimizer.driver.applied_steps
        scaler.scale(loss_of(model, "matrices", step)).backward()
        if step in overflows:
            gradient = layers_of(model)["tall"].principal_values.grad
            assert gradient is not None
            gradient[0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert optimizer.driver.applied_steps == count + (step not in overflows)
        if step in overflows:
            assert all(same_bits(before[name], parameter) for name, parameter in model.named_parameters())
    assert [report.step for report in optimizer.driver.reports] == [3]
    assert weights_hold_the_values(model)


def _saved(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Through a file's bytes, as a checkpoint goes; tensors and plain values alone."""
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 6])  # a refresh every 3 steps: before it, after it, in between
@pytest.mark.parametrize("kind", ["llama", "matrices"])
def test_resuming_continues_to_the_bit(kind: str, stop: int) -> None:
    model, optimizer = prepared(kind)
    expected = train(model, optimizer, kind, range(10))

    first, first_optimizer = prepared(kind)
    losses = train(first, first_optimizer, kind, range(stop))
    saved = _saved(first, first_optimizer)

    resumed = build(kind)
    with torch.no_grad():  # another start, so that nothing can be right by itself
        for parameter in resumed.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    lift_ds.attach(resumed, CONFIG)
    resumed_optimizer = lift_ds.LiftAdamW(resumed)  # lr and decay come from the checkpoint
    resumed.load_state_dict(saved["model"])
    resumed_optimizer.load_state_dict(saved["optimizer"])
    assert applied_steps(resumed_optimizer) == stop
    losses += train(resumed, resumed_optimizer, kind, range(stop, 10))

    assert losses == expected
    assert applied_steps(resumed_optimizer) == applied_steps(optimizer) == 10
    for name, parameter in model.named_parameters():
        twin = resumed.get_parameter(name)
        assert same_bits(parameter, twin), name
        if parameter in optimizer.state:
            for key, value in optimizer.state[parameter].items():
                assert same_bits(value, resumed_optimizer.state[twin][key]), f"{key} of {name}"
    assert optimizer.driver is not None
    assert resumed_optimizer.driver is not None
    due = [report.step for report in optimizer.driver.reports]
    assert due == [3, 6, 9]
    assert [report.step for report in resumed_optimizer.driver.reports] == [step for step in due if step > stop]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_decay_decays_the_principal_values(dtype: torch.dtype) -> None:
    model, optimizer = prepared(
        "llama", lift_ds.LiftConfig(budget_rank=3, lra_rank=3), dtype, weight_decay=0.5, lr=0.25
    )
    before = snapshot(model)
    for step in range(2):
        (loss_of(model, "llama", step) * 0).backward()  # gradients of zero: all that is left is the decay
        optimizer.step()
        optimizer.zero_grad()
    for name, layer in layers_of(model).items():
        expected = before[f"{name}.principal.values"] * (1 - 0.25 * 0.5) ** 2
        # Powers of two: exact but for one rounding a step, 6e-8.
        torch.testing.assert_close(layer.principal_values.detach(), expected, rtol=2e-7, atol=0.0)
        untouched = before[f"{name}.weight"].clone()
        untouched.view(-1)[layer.principal_index.long()] = layer.principal_values.detach().to(dtype)
        assert same_bits(layer.weight, untouched)


def test_float32_values_train_bf16_weights() -> None:
    """W is θ rounded; θ keeps the digits, so that updates smaller than bf16's spacing add up."""
    model, optimizer = prepared("llama", dtype=torch.bfloat16, lr=1e-5, weight_decay=0.0)
    before = snapshot(model)
    for step in range(5):
        train(model, optimizer, "llama", range(step, step + 1))
        assert weights_hold_the_values(model)
    for name, layer in layers_of(model).items():
        assert layer.weight.dtype == torch.bfloat16
        values = layer.principal_values.detach()
        assert values.dtype == torch.float32
        moved = (values - before[f"{name}.weight"].view(-1)[layer.principal_index.long()].float()).abs()
        assert moved.median() > 1e-5, "the steps of 1e-5 were lost"
        assert not torch.equal(values, values.bfloat16().float())


def test_backward_without_an_optimizer_of_lift_is_refused() -> None:
    model = lift_ds.attach(build("matrices"), CONFIG)
    with pytest.raises(RuntimeError, match="LIFT is attached but not active: nothing applies the principal values"):
        loss_of(model, "matrices", 0).backward()
    # An optimizer over bare parameters does not know the model: nothing would be written back.
    lift_ds.LiftAdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(RuntimeError, match="not active"):
        loss_of(model, "matrices", 0).backward()
    with torch.no_grad():
        loss_of(model, "matrices", 0)  # evaluation is fine


def test_steps_of_another_optimizer_are_noticed() -> None:
    """A LiftAdamW is built, as for a Trainer, and dropped; what trains instead writes nothing back."""
    model, _ = prepared()
    other = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    loss_of(model, "matrices", 0).backward()
    loss_of(model, "matrices", 1).backward()  # accumulating is fine
    other.step()

    def go_on() -> None:
        for step in range(4):
            loss_of(model, "matrices", step).backward()

    with pytest.raises(RuntimeError, match="not active: an optimizer changed the principal values"):
        go_on()


def test_step_without_a_gradient_is_refused() -> None:
    model, optimizer = prepared()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="not active: no gradient reached a principal value"):
        optimizer.step()
    assert applied_steps(optimizer) == 0
    assert all(same_bits(before[name], parameter) for name, parameter in model.named_parameters())
    train(model, optimizer, "matrices", range(1))
    with pytest.raises(RuntimeError, match="no gradient reached"):
        optimizer.step()
    assert applied_steps(optimizer) == 1


class _Checkpointed(nn.Module):
    """Frozen embeddings, a managed layer under reentrant checkpointing, and a norm that is trained beside."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear, self.norm = nn.Embedding(5, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, tokens: torch.Tensor, require_grad: bool) -> torch.Tensor:
        x = self.embedding(tokens).requires_grad_(require_grad)
        return self.norm(checkpoint(self.linear, x, use_reentrant=True)).sin().sum()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_reentrant_checkpointing_over_frozen_embeddings_is_refused_with_the_cure() -> None:
    model = lift_ds.attach(_Checkpointed(), lift_ds.LiftConfig(density=0.5, extra_trainable=("norm.weight",)))
    optimizer = lift_ds.LiftAdamW(model)
    model(torch.arange(5), require_grad=False).backward()  # the norm has a gradient, so that the step looks good
    with pytest.raises(RuntimeError, match="enable_input_require_grads"):
        optimizer.step()
    model(torch.arange(5), require_grad=True).backward()
    optimizer.step()
    assert applied_steps(optimizer) == 1


def test_optimizer_over_groups_works_when_bound() -> None:
    """The Trainer's `optimizer_cls_and_kwargs` gives LiftAdamW groups instead of a model."""
    model, optimizer = prepared(weight_decay=0.0)
    twin = lift_ds.attach(build("matrices"), CONFIG)
    values = [layer.principal_values for layer in layers_of(twin).values()]
    grouped = lift_ds.LiftAdamW([{"params": values[:1]}, {"params": values[1:], "weight_decay": 0.0}], lr=LR)
    driver = bind(twin, grouped)
    assert bind(twin, grouped) is driver is grouped.driver
    assert train(model, optimizer, "matrices", range(7)) == train(twin, grouped, "matrices", range(7))
    assert driver.applied_steps == 7
    assert [group[APPLIED_STEPS] for group in grouped.param_groups] == [7, 7]
    for name, layer in layers_of(model).items():
        assert same_bits(layer.weight, layers_of(twin)[name].weight)


def test_binding_an_optimizer_that_trains_something_else_is_refused() -> None:
    model = build("matrices")
    early = torch.optim.AdamW(model.parameters())  # before `attach`: it holds the weights, not the values
    lift_ds.attach(model, CONFIG)
    with pytest.raises(ValueError, match=r"AdamW does not train the principal values of 4 matrices \(tall, \.\.\.\)"):
        bind(model, early)
    some = lift_ds.LiftAdamW([layers_of(model)["tall"].principal_values])
    with pytest.raises(ValueError, match="of 3 matrices"):
        bind(model, some)
    with pytest.raises(ValueError, match="LIFT is not attached"):
        bind(build("matrices"), early)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("other", [torch.optim.Adam, torch.optim.AdamW])
def test_other_optimizers_in_the_process_change_nothing(other: type[torch.optim.Optimizer], when: str) -> None:
    """torch wraps `step` class by class when an optimizer is built; LIFT's part of a step must still run once."""
    if when == "before":
        other([nn.Parameter(torch.zeros(2))])
    model, optimizer = prepared()
    if when == "after":
        other([nn.Parameter(torch.zeros(2))])
    train(model, optimizer, "matrices", range(3))
    assert applied_steps(optimizer) == 3


def test_schedulers_and_closures_work() -> None:
    model, optimizer = prepared(weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 2 else 0.0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, "matrices", 0)
        loss.backward()
        return loss

    losses = []
    for _ in range(4):
        losses.append(optimizer.step(closure).item())
        schedule.step()
    assert losses[0] > losses[1] > losses[2] == losses[3]  # the rate is zero from the third step on
    assert applied_steps(optimizer) == 4


def test_model_trains_densely_again_after_detach() -> None:
    model, optimizer = prepared()
    train(model, optimizer, "matrices", range(2))
    values = {name: layer.weight.detach().clone() for name, layer in layers_of(model).items()}
    lift_ds.detach(model)
    assert all(same_bits(values[name], model.get_submodule(name).weight) for name in values)
    loss_of(model, "matrices", 0).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
