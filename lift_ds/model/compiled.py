"""A managed layer in a graph of torch.compile: its gradient of θ is one operator of the graph.

The compiler does not look inside that operator. When it runs it finds its layer and does what backward does without
compilation: it fetches the index, tells the attachment, and forms dL/dW a tile of rows at a time.

The operator gets the number of its layer as a tensor. A plain number would be a constant of the graph, so that every
layer would be compiled anew.
"""

from __future__ import annotations

import itertools
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class TracedLayer(Protocol):
    """What the operator asks of a layer."""

    def values_gradient(self, x: Tensor, grad_output: Tensor, dtype: torch.dtype) -> Tensor:
        """Return dL/dθ [k] in a dtype, for x [..., inputs] and dL/dy [..., outputs]."""


_layers: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers = itertools.count()


def handle_for(layer: TracedLayer) -> Tensor:
    """Return a new handle by which the operator finds a layer: int64 [], on the host."""
    number = next(_numbers)
    _layers[number] = layer
    return torch.tensor(number, device="cpu")


@torch.library.custom_op("lift_ds::values_gradient", mutates_args=())
def _values_gradient(x: Tensor, grad_output: Tensor, values: Tensor, handle: Tensor) -> Tensor:
    return _layers[int(handle)].values_gradient(x, grad_output, values.dtype)


@_values_gradient.register_fake
def _(x: Tensor, grad_output: Tensor, values: Tensor, handle: Tensor) -> Tensor:
    return values.new_empty(values.shape)


class TracedLinear(torch.autograd.Function):
    """y = x Wᵀ + b, or x W + b, with a gradient for x, θ and b, and none for W."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None, handle: Tensor, transposed: bool
    ) -> Tensor:
        ctx.transposed = transposed
        ctx.save_for_backward(x, values, weight, handle)
        return product(x, weight, bias, transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, values, weight, handle = ctx.saved_tensors
        needs_x, needs_values, _, needs_bias, *_ = ctx.needs_input_grad
        grad_x = input_gradient(grad_output, weight, ctx.transposed).to(x.dtype) if needs_x else None
        grad_values = _values_gradient(x, grad_output, values, handle) if needs_values else None
        grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0) if needs_bias else None
        return grad_x, grad_values, None, grad_bias, None, None


def product(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """Return y [..., outputs] for x [..., inputs], in the dtype of x.

    Args:
        x: of the layer.
        weight: [outputs, inputs], or where it is stored transposed [inputs, outputs].
        bias: [outputs].
        transposed: how the weight is stored.
    """
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if not transposed:
        return torch.nn.functional.linear(x, weight, bias)
    y = x @ weight
    return y if bias is None else y + bias


def input_gradient(grad_output: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """Return dL/dx [..., inputs] for dL/dy [..., outputs]; the other arguments are those of `product`."""
    weight = weight.to(grad_output.dtype)
    return grad_output @ (weight.T if transposed else weight)
