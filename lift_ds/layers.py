"""LiftLinear: a linear layer that trains the principal values of its weight and nothing else.

      weight  W [m, n]  frozen          principal.values  θ [k]  trainable      principal.index  I [k]  frozen

      forward    y = x Wᵀ
      backward   dx = dy W;   dW = dyᵀ x lives for the length of this layer's backward;   θ.grad = dW.flat[I]

θ is an ordinary parameter, so that ZeRO shards, reduces, clips, offloads and saves it as it does any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from lift_ds.principal import PrincipalSet

if TYPE_CHECKING:
    from lift_ds.attachment import Attachment

#: Name of the submodule with θ and I, and how the names of θ end.
PRINCIPAL = "principal"
VALUES = f"{PRINCIPAL}.values"
#: Names of what a managed layer has more than a plain one, in its state dict.
PRINCIPAL_KEYS = (VALUES, f"{PRINCIPAL}.index.words")


class _PrincipalLinear(torch.autograd.Function):
    """y = x Wᵀ + b with a gradient for x, θ and b, and none for W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, layer: PrincipalLayer) -> Tensor:
        # The layer, not its tensors: ZeRO-3 swaps the storage of a parameter between forward and backward, and a
        # saved view (or the copy that activation checkpointing packs) would keep the gathered weight alive.
        ctx.layer = layer
        ctx.values_dtype = values.dtype
        ctx.save_for_backward(x)
        return layer.apply_weight(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (x,) = ctx.saved_tensors
        layer: PrincipalLayer = ctx.layer
        needs_x, needs_values, needs_bias, _ = ctx.needs_input_grad
        grad_x = layer.input_gradient(grad_output).to(x.dtype) if needs_x else None
        grad_2d = grad_output.reshape(-1, grad_output.shape[-1])  # [tokens, m]
        grad_values = None
        if needs_values:
            index = layer.principal.index()  # int32 [k]
            layer.lift_attachment.note_backward(layer, index)
            x_2d = x.reshape(-1, x.shape[-1]).to(grad_2d.dtype)  # [tokens, n]
            grad_weight = layer.weight_gradient(x_2d, grad_2d)
            grad_values = grad_weight.view(-1).index_select(0, index).to(ctx.values_dtype)  # [k]
        grad_bias = grad_2d.sum(0) if needs_bias else None
        return grad_x, grad_values, grad_bias, None


class PrincipalLayer(nn.Module):
    """What the managed layers share; `weight` keeps its name, its layout and its place in the state dict."""

    weight: Tensor
    bias: Any  # a parameter or None
    principal: PrincipalSet
    lift_attachment: Attachment

    def forward(self, input: Tensor) -> Tensor:
        # Autograd functions run below autocast: cast what is saved once, as autocast would cast it for the product.
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        return _PrincipalLinear.apply(input, self.principal.for_autograd(), self.bias, self)

    @property
    def principal_values(self) -> nn.Parameter:
        """θ [k], in the dtype of training."""
        return self.principal.values

    @property
    def principal_index(self) -> Tensor:
        """I, int32 [k], flat row-major positions in `weight`, ascending; where its words are whole."""
        return self.principal.index.positions()

    def shape(self) -> torch.Size:
        """Return [m, n], wherever W is."""
        return logical_shape(self.weight)

    def entries(self) -> int:
        """Return k, wherever θ and I are."""
        return self.principal.index.entries

    @torch.no_grad()
    def holds_its_values(self, index: Tensor) -> bool:
        """Tell whether W.flat[I] = θ, in the dtype of W; all three whole."""
        held = self.weight.view(-1)[index.long()]  # [k]
        return torch.equal(held, self.principal_values.to(held.dtype))

    def apply_weight(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer's output for x [..., n]."""
        raise NotImplementedError

    def input_gradient(self, grad_output: Tensor) -> Tensor:
        """Return dL/dx [..., n] for dL/dy [..., m]."""
        raise NotImplementedError

    def weight_gradient(self, x: Tensor, grad_output: Tensor) -> Tensor:
        """Return dL/dW in the layout of `weight`, for x [tokens, n] and dL/dy [tokens, m]."""
        raise NotImplementedError


class LiftLinear(PrincipalLayer, nn.Linear):
    """`nn.Linear`, weight [m, n] = [out, in]."""

    def apply_weight(self, x: Tensor, bias: Tensor | None) -> Tensor:
        weight = self.weight.to(x.dtype)
        return nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))

    def input_gradient(self, grad_output: Tensor) -> Tensor:
        return grad_output @ self.weight.to(grad_output.dtype)

    def weight_gradient(self, x: Tensor, grad_output: Tensor) -> Tensor:
        return grad_output.T @ x  # [out, in]


class LiftConv1D(PrincipalLayer, Conv1D):
    """The transposed linear layer of GPT-2, weight [in, out].

    The low-rank approximation of Wᵀ is the transpose of that of W, so the selection needs no transposition.
    """

    def apply_weight(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y = x @ self.weight.to(x.dtype)
        return y if bias is None else y + bias.to(x.dtype)

    def input_gradient(self, grad_output: Tensor) -> Tensor:
        return grad_output @ self.weight.to(grad_output.dtype).T

    def weight_gradient(self, x: Tensor, grad_output: Tensor) -> Tensor:
        return x.T @ grad_output  # [in, out]


#: Class of a layer as the model has it -> class that manages it. The class is swapped in place, so that the module
#: object, its parameters, hooks and names stay what they were.
MANAGED_CLASSES: dict[type[nn.Module], type[PrincipalLayer]] = {nn.Linear: LiftLinear, Conv1D: LiftConv1D}


def principal_layers(model: nn.Module) -> Iterator[tuple[str, PrincipalLayer]]:
    """Yield (dotted name, layer) of the managed layers, in the order of the model's modules."""
    for name, module in model.named_modules():
        if isinstance(module, PrincipalLayer):
            yield name, module


def logical_shape(parameter: Tensor) -> torch.Size:
    """Return the shape of a parameter, also where ZeRO-3 has partitioned it and its own shape is (0,)."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
