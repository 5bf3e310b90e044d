"""LiftLinear: a linear layer that trains the principal values of its weight and nothing else.

      weight  W [m, n]  frozen          principal.values  θ [k]  trainable      principal.index  I [k]  frozen

      forward    y = x Wᵀ
      backward   dx = dy W;   dW = dyᵀ x, a tile of its rows after the other;             θ.grad = dW.flat[I]

θ is an ordinary parameter, so that ZeRO shards, reduces, clips, offloads and saves it as it does any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from lift_ds.kernels import entries_of
from lift_ds.principal import PrincipalSet
from lift_ds.selection.encoding import CompactIndex

if TYPE_CHECKING:
    from lift_ds.attachment import Attachment

#: Name of the submodule with θ and I, and how the names of θ end.
PRINCIPAL = "principal"
VALUES = f"{PRINCIPAL}.values"
#: Names of what a managed layer has more than a plain one, in its state dict.
PRINCIPAL_KEYS = (VALUES, f"{PRINCIPAL}.index.words")

#: Entries of dW that are formed at a time: 32 MiB in bf16. The host's are to stay in its cache until they are gathered;
#: smaller ones than these cost its products more (each packs the activations again) than the gathering gains.
TILE_ENTRIES, HOST_TILE_ENTRIES = 2**24, 2**22


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
            index = CompactIndex(layer.principal.index(), layer.principal.index.layout)
            layer.lift_attachment.note_backward(layer, index)
            x_2d = x.reshape(-1, x.shape[-1]).to(grad_2d.dtype)  # [tokens, n]
            grad_values = _values_gradient(layer, x_2d, grad_2d, index, ctx.values_dtype)  # [k]
        grad_bias = grad_2d.sum(0) if needs_bias else None
        return grad_x, grad_values, grad_bias, None


def _values_gradient(
    layer: PrincipalLayer, x: Tensor, grad_output: Tensor, index: CompactIndex, dtype: torch.dtype
) -> Tensor:
    """Return dL/dθ [k]; of dL/dW, which has the dtype of x, there is one tile of rows at a time.

    Args:
        layer: whose weight it is.
        x: [tokens, inputs].
        grad_output: [tokens, outputs], in the dtype of x.
        index: the principal index, whole.
        dtype: of θ, and of what is returned.
    """
    columns, entries = index.layout.columns, entries_of(index)
    tiles = _row_tiles(index.layout.rows, columns, HOST_TILE_ENTRIES if x.device.type == "cpu" else TILE_ENTRIES)
    tile = x.new_empty(tiles[0].stop, columns)  # the first is the largest
    gradient = x.new_empty(index.layout.entries, dtype=dtype)
    for rows in tiles:
        part = tile[: rows.stop - rows.start]
        layer.weight_gradient(x, grad_output, rows, part)
        entries.gather(part.view(-1), rows.start * columns, gradient)
    return gradient


def _row_tiles(rows: int, columns: int, entries: int) -> list[slice]:
    """Cut the rows of a matrix into tiles of as equal numbers of rows as can be, of about `entries` at most.

    Equal, because a small product that is left over at the end costs nearly as much as a full one.
    """
    count = max(1, min(rows, -(-rows * columns // entries)))
    step = -(-rows // count)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


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

    def weight_gradient(self, x: Tensor, grad_output: Tensor, rows: slice, out: Tensor) -> None:
        """Form some rows of dL/dW.

        Args:
            x: [tokens, inputs].
            grad_output: dL/dy [tokens, outputs], in the dtype of x.
            rows: of `weight` as it is stored.
            out: [rows, columns of `weight`] in the dtype of x, overwritten.
        """
        raise NotImplementedError


class LiftLinear(PrincipalLayer, nn.Linear):
    """`nn.Linear`, weight [m, n] = [out, in]."""

    def apply_weight(self, x: Tensor, bias: Tensor | None) -> Tensor:
        weight = self.weight.to(x.dtype)
        return nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))

    def input_gradient(self, grad_output: Tensor) -> Tensor:
        return grad_output @ self.weight.to(grad_output.dtype)

    def weight_gradient(self, x: Tensor, grad_output: Tensor, rows: slice, out: Tensor) -> None:
        torch.mm(grad_output[:, rows].T, x, out=out)  # [some of out, in]


class LiftConv1D(PrincipalLayer, Conv1D):
    """The transposed linear layer of GPT-2, weight [in, out].

    The low-rank approximation of Wᵀ is the transpose of that of W, so the selection needs no transposition.
    """

    def apply_weight(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y = x @ self.weight.to(x.dtype)
        return y if bias is None else y + bias.to(x.dtype)

    def input_gradient(self, grad_output: Tensor) -> Tensor:
        return grad_output @ self.weight.to(grad_output.dtype).T

    def weight_gradient(self, x: Tensor, grad_output: Tensor, rows: slice, out: Tensor) -> None:
        torch.mm(x[:, rows].T, grad_output, out=out)  # [some of in, out]


class LiftFalconLinear(LiftLinear):
    """The linear layer of Falcon, weight [out, in]; it is `nn.Linear` up to where its bias is added and rounded."""


#: Class of a layer as the model has it -> class that manages it. The class is swapped in place, so that the module
#: object, its parameters, hooks and names stay what they were.
MANAGED_CLASSES: dict[type[nn.Module], type[PrincipalLayer]] = {
    nn.Linear: LiftLinear,
    Conv1D: LiftConv1D,
    FalconLinear: LiftFalconLinear,
}


def principal_layers(model: nn.Module) -> Iterator[tuple[str, PrincipalLayer]]:
    """Yield (dotted name, layer) of the managed layers, in the order of the model's modules."""
    for name, module in model.named_modules():
        if isinstance(module, PrincipalLayer):
            yield name, module


def logical_shape(parameter: Tensor) -> torch.Size:
    """Return the shape of a parameter, also where ZeRO-3 has partitioned it and its own shape is (0,)."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
