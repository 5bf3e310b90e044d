"""Pins that torch.compile takes managed layers into its graph: as many graphs as for the plain model, no recompilation
from layer to layer, `fullgraph=True`, and the training of the model that is not compiled.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from cases import small_llama, token_batch
from helpers import layers_of, same_bits
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.pytorch_utils import Conv1D

import lift_ds

CONFIG = lift_ds.LiftConfig(density=0.1, lra_rank=2, refresh_interval=2, lr=1e-3)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def attached() -> Any:
    return lift_ds.attach(small_llama(use_cache=False), CONFIG)


def train(model: Any, run: Any, steps: int = 3) -> list[float]:
    """Steps of a model that may be run compiled; with refreshes."""
    optimizer = lift_ds.LiftAdamW(model, lr=CONFIG.lr)
    losses = []
    for step in range(steps):
        tokens = token_batch(step)
        loss = run(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_model_is_one_graph_compiled_once() -> None:
    """One for training, as the plain model; none more in later steps, after refreshes too."""
    counter = CompileCounterWithBackend("aot_eager")
    model = attached()
    train(model, torch.compile(model, backend=counter, fullgraph=True))
    assert counter.frame_count == 1
    plain = small_llama()
    assert torch._dynamo.explain(plain)(input_ids=token_batch(0)).graph_count == 1


def test_layers_compiled_one_by_one_share_a_graph() -> None:
    """As `compile_repeated_blocks` does: what differs from layer to layer is no constant of the graph."""
    counter = CompileCounterWithBackend("aot_eager")
    model = attached()
    model.enable_input_require_grads()  # else the first layer's input differs from the others' in that
    for layer in model.model.layers:
        layer.compile(backend=counter, fullgraph=True)
    train(model, model)
    assert counter.frame_count == 1


@pytest.mark.parametrize("recomputed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_training_is_that_of_the_model_as_it_is(recomputed: bool) -> None:
    """Backend "aot_eager" runs torch's own operators, so to the bit but for sums in another order (float32's 6e-8)."""
    plain, compiled = attached(), attached()
    if recomputed:
        for model in (plain, compiled):
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = train(plain, plain)
    found = train(compiled, torch.compile(compiled, backend="aot_eager"))
    assert found == pytest.approx(expected, rel=1e-6)
    for name, layer in layers_of(plain).items():
        twin = layers_of(compiled)[name]
        assert torch.equal(layer.principal_index, twin.principal_index)
        torch.testing.assert_close(twin.weight, layer.weight, rtol=0, atol=1e-6)


@pytest.mark.slow  # the compiler's own code is built by a C++ compiler
def test_training_compiled_by_inductor_is_that_of_the_model_as_it_is() -> None:
    plain, compiled = attached(), attached()
    expected, found = train(plain, plain), train(compiled, torch.compile(compiled, fullgraph=True))
    # Fused sums: float32's 6e-8, over some hundred terms.
    assert found == pytest.approx(expected, rel=1e-5)
    for name, layer in layers_of(plain).items():
        assert torch.equal(layer.principal_index, layers_of(compiled)[name].principal_index)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_compiled_layer_has_the_gradients_of_the_layer(kind: str, autocast: bool) -> None:
    torch.manual_seed(12)
    plain = nn.Sequential(nn.Linear(6, 5) if kind == "linear" else Conv1D(5, 6))
    config = lift_ds.LiftConfig(density=0.5, lra_rank=2, extra_trainable=("bias",))
    model = lift_ds.attach(plain, config)
    twin = copy.deepcopy(model)
    gradients = []
    for one, run in ((model, model), (twin, torch.compile(twin, backend="aot_eager", fullgraph=True))):
        lift_ds.LiftAdamW(one)
        x = torch.linspace(-1, 1, 24).view(2, 2, 6).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = run(x)
        y.float().sin().sum().backward()
        gradients.append([x.grad, one[0].bias.grad, one[0].lift_weight.principal_values.grad, y])
    for found, expected in zip(*gradients, strict=True):
        assert same_bits(found, expected)
    assert gradients[0][3].dtype == (torch.bfloat16 if autocast else torch.float32)


def test_a_compiled_run_in_which_lift_is_not_active_stops() -> None:
    model = attached()
    run = torch.compile(model, backend="aot_eager")
    with pytest.raises(RuntimeError, match="LIFT is attached but not active"):
        run(input_ids=token_batch(0), labels=token_batch(0)).loss.backward()
