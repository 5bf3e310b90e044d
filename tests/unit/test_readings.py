"""Weights that a module reads in a forward of its own: convolutions, attention of torch, derived linear layers, stacks
of experts. Their θ has the entries of the dense gradient. Of a stack each matrix has its own k. No dense one stays.
"""

from __future__ import annotations

import copy
import gc
import io
from dataclasses import replace
from typing import Any

import cases
import pytest
import torch
from helpers import layers_of
from torch import Tensor, nn

import lift_ds
from lift_ds.model.attachment import require_attachment
from lift_ds.model.readings import ReadModule
from lift_ds.model.weights import PrincipalWeight

CONFIG = lift_ds.LiftConfig(density=0.25, lra_rank=2, refresh_interval=2)


class Derived(nn.Linear):
    """Its forward is not that of a linear layer."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.tanh(input @ (self.weight * 2).T + input @ self.weight.T)


class Experts(nn.Module):
    """A stack that is read as a whole, matrix by matrix, or both ways, as one likes."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(2)))
        self.reads: tuple[Any, ...] = (0, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = x.new_zeros(x.shape[0], 6)
        for read in self.reads:
            if read == "whole":
                y = y + torch.einsum("bn,emn->bm", x, self.stack).sin()
            else:
                y = y + (x @ self.stack[read].T).sin()
        return y


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x)[0]


#: Kind -> (module, shape of its input, matrices by name).
KINDS: dict[str, tuple[Any, tuple[int, ...], dict[str, tuple[int, int, int]]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9), {"0": (1, 6, 12)}),
    "depth-wise": (lambda: nn.Conv1d(6, 6, 4, groups=6), (2, 6, 9), {"0": (1, 6, 4)}),
    "conv2d": (lambda: nn.Conv2d(3, 5, 2), (2, 3, 4, 4), {"0": (1, 5, 12)}),
    "transposed": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 5), {"0": (1, 4, 18)}),
    "attention": (Attention, (2, 5, 8), {"0.inner.in_proj_weight": (1, 24, 8), "0.inner.out_proj": (1, 8, 8)}),
    "derived": (lambda: Derived(8, 6, bias=False), (5, 8), {"0": (1, 6, 8)}),
    "stack": (Experts, (5, 8), {"0.stack": (3, 6, 8)}),
}


def twins(kind: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A plain model and a managed one with the same weights, and an input; float64."""
    torch.manual_seed(6)
    make, shape, _ = KINDS[kind]
    plain = nn.Sequential(make()).double()
    managed = lift_ds.attach(copy.deepcopy(plain), CONFIG)
    lift_ds.LiftAdamW(managed)
    return plain, managed, torch.randn(shape, dtype=torch.float64)


def dense_entries(plain: nn.Module, weight: PrincipalWeight) -> Tensor:
    gradient = plain.get_parameter(weight.full_name).grad
    assert gradient is not None
    return gradient.reshape(-1)[weight.principal_index.long()]


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_has_the_entries_of_the_dense_one(kind: str) -> None:
    plain, managed, x = twins(kind)
    assert {name: (w.matrices, *w.shape()) for name, w in layers_of(managed).items()} == KINDS[kind][2]
    outputs = []
    for model in (plain, managed):
        y = model(x)
        y.sin().sum().backward()
        outputs.append(y.detach())
    # Float64, the same operators, which may add in another order where tensors lie elsewhere in memory.
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-14)
    for weight in layers_of(managed).values():
        assert weight.weight.grad is None
        torch.testing.assert_close(weight.principal_values.grad, dense_entries(plain, weight), rtol=1e-12, atol=1e-14)
        assert isinstance(weight.module, ReadModule)


@pytest.mark.parametrize("reads", [(0,), (2, 1), (1, 1), ("whole",), ("whole", 2), (0, "whole", 0), (-1, 1)])
def test_however_a_stack_is_read(reads: tuple[Any, ...]) -> None:
    plain, managed, x = twins("stack")
    for model in (plain, managed):
        model[0].reads = reads  # type: ignore[index,union-attr]
        model(x).sin().sum().backward()
    (weight,) = layers_of(managed).values()
    assert weight.principal_values.grad is not None
    torch.testing.assert_close(weight.principal_values.grad, dense_entries(plain, weight), rtol=1e-12, atol=1e-14)


def test_matrices_that_nothing_read_have_a_gradient_of_zeros_and_stay() -> None:
    _, managed, x = twins("stack")
    managed[0].reads = (1,)  # type: ignore[index,union-attr]
    (weight,) = layers_of(managed).values()
    before, k = weight.weight.clone(), weight.layout.of_one.entries
    optimizer = require_attachment(managed).optimizer
    managed(x).sin().sum().backward()
    gradient = weight.principal_values.grad
    assert gradient is not None
    assert gradient[k : 2 * k].abs().min() > 0
    assert not gradient[:k].any()
    assert not gradient[2 * k :].any()
    optimizer.step()
    assert torch.equal(weight.weight[0], before[0])
    assert not torch.equal(weight.weight[1], before[1])


def test_a_stack_outside_of_the_loss_is_no_error() -> None:
    torch.manual_seed(6)
    model = lift_ds.attach(nn.ModuleList([nn.Linear(8, 6), Experts()]), CONFIG)
    optimizer = lift_ds.LiftAdamW(model)
    model[0](torch.randn(4, 8)).sum().backward()
    optimizer.step()
    assert layers_of(model)["1.stack"].principal_values.grad is None


def test_selections_are_those_of_each_matrix_by_itself() -> None:
    _, managed, _ = twins("stack")
    (weight,) = layers_of(managed).values()
    k = CONFIG.entries(6, 8)
    for number, matrix in enumerate(weight.weight):
        own = lift_ds.principal_indices(matrix, k=k, lra_rank=2)
        assert (weight.principal_index[number * k : (number + 1) * k] - number * 48).tolist() == own.tolist()


def test_outside_of_training_the_weight_is_the_parameter() -> None:
    _, managed, _ = twins("stack")
    (weight,) = layers_of(managed).values()
    with torch.no_grad():
        assert managed[0].stack is weight.weight  # type: ignore[index,union-attr]
    managed.eval()
    assert managed[0].stack is weight.weight  # type: ignore[index,union-attr]
    assert "0.stack" in managed.state_dict()


def test_copies_and_pickles_are_managed_alike() -> None:
    _, managed, x = twins("stack")
    file = io.BytesIO()
    copied = copy.deepcopy(managed)
    require_attachment(managed).driver = require_attachment(managed).optimizer = None
    torch.save(managed, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for model in (copied, loaded):
        lift_ds.LiftAdamW(model)
        model(x).sin().sum().backward()
        (weight,) = layers_of(model).values()
        assert weight.module is model[0]
        assert weight.principal_values.grad is not None
        assert weight.principal_values.grad.any()


def test_experts_follow_the_criterion_gradient() -> None:
    config = replace(cases.PARITY, criterion="gradient")
    plain = cases.build("mixtral").requires_grad_(False)
    stacks = {name: weight.requires_grad_() for name, weight in cases.managed_stacks(plain).items()}
    model = lift_ds.attach(cases.build("mixtral"), config)
    lift_ds.LiftAdamW(model)
    lift_ds.select_by_gradients(model, cases.gradient_batches())
    measured = cases.mean_gradients(plain, stacks)
    for name, weight in layers_of(model).items():
        whole = measured[name].reshape(weight.matrices, -1)
        k = weight.layout.of_one.entries
        for number, gradient in enumerate(whole):
            own = weight.principal_index[number * k : (number + 1) * k].long() - number * gradient.numel()
            # As many as the largest: equal ones, such as zeros, may be others.
            assert torch.equal(gradient[own].sort().values, gradient.topk(k).values.sort().values), (name, number)


def test_no_dense_gradient_but_of_one_stack_is_alive() -> None:
    """Two layers, whose stacks are read as a whole: never two dense gradients beside what a plain forward takes."""
    model = cases.small_experts("mixtral", "grouped_mm")
    largest = max(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    lift_ds.LiftAdamW(lift_ds.attach(model, cases.PARITY))
    assert alive_after_backward(model, largest) == []


def alive_after_backward(model: nn.Module, entries: int) -> list[torch.Size]:
    """Shapes of the tensors of at least so many entries that a backward has left."""
    before = {id(tensor) for tensor in tensors_of(entries)}
    cases.loss_of(model, "mixtral", 0).backward()
    return [tensor.shape for tensor in tensors_of(entries) if id(tensor) not in before]


def tensors_of(entries: int) -> list[Tensor]:
    """Those that Python holds, of at least so many entries."""
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) is Tensor and thing.numel() >= entries]
