"""LiftLinear: a linear layer that trains the principal values of its weight and nothing else.

      weight  W [m, n]  frozen          principal.values  θ [k]  trainable      principal.index  I [k]  frozen

      forward    y = x Wᵀ
      backward   dx = dy W;   dW = dyᵀ x, a tile of its rows after the other;             θ.grad = dW.flat[I]

θ is an ordinary parameter, so that ZeRO shards, reduces, clips, offloads and saves it as it does any other.

Whatever else has a weight keeps its own forward: see `readings`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lift_ds.index.access import access_to
from lift_ds.model.compiled import TracedLinear, handle_for, input_gradient, product
from lift_ds.model.managed import ManagedModule
from lift_ds.model.parameters import PrincipalSet
from lift_ds.model.weights import WEIGHTS, PrincipalWeight

#: Entries of dW that are formed at a time: 32 MiB in bf16. The host's are to stay in its cache until they are gathered;
#: smaller ones than these cost its products more (each packs the activations again) than the gathering gains.
GRADIENT_TILE, HOST_GRADIENT_TILE = 2**24, 2**22


class _PrincipalLinear(torch.autograd.Function):
    """y = x Wᵀ + b with a gradient for x, θ and b, and none for W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, layer: PrincipalLayer) -> Tensor:
        # The layer, not its tensors: ZeRO-3 swaps the storage of a parameter between forward and backward, and a
        # saved view (or the copy that activation checkpointing packs) would keep the gathered weight alive.
        ctx.layer = layer
        ctx.values_dtype = values.dtype
        ctx.save_for_backward(x)
        return product(x, layer.weight, bias, layer.transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (x,) = ctx.saved_tensors
        layer: PrincipalLayer = ctx.layer
        needs_x, needs_values, needs_bias, _ = ctx.needs_input_grad
        grad_x = input_gradient(grad_output, layer.weight, layer.transposed).to(x.dtype) if needs_x else None
        grad_values = layer.values_gradient(x, grad_output, ctx.values_dtype) if needs_values else None
        grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0) if needs_bias else None
        return grad_x, grad_values, grad_bias, None


def _row_tiles(rows: int, columns: int, entries: int) -> list[slice]:
    """Cut the rows of a matrix into tiles of as equal numbers of rows as can be, of about `entries` at most.

    Equal, because a small product that is left over at the end costs nearly as much as a full one.
    """
    count = max(1, min(rows, -(-rows * columns // entries)))
    step = -(-rows // count)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


class PrincipalLayer(ManagedModule):
    """What the linear layers share; `weight` keeps its name, its layout and its place in the state dict."""

    weight: Tensor
    bias: Any  # a parameter or None
    principal: PrincipalSet
    #: By which a compiled graph finds this layer.
    lift_handle: Tensor
    #: Whether `weight` is [inputs, outputs].
    transposed: ClassVar[bool]

    def forward(self, input: Tensor) -> Tensor:
        # Autograd functions run below autocast: cast what is saved once, as autocast would cast it for the product.
        if not input.is_meta and torch.is_autocast_enabled(input.device.type):  # which knows no meta device
            input = input.to(torch.get_autocast_dtype(input.device.type))
        weight = self.lift_weight
        if torch.compiler.is_compiling() and not weight.owner.partitioned:
            values = weight.for_training(self.principal.values)
            return TracedLinear.apply(input, values, self.weight, self.bias, self.lift_handle, self.transposed)
        return self.run_uncompiled(input)

    def run_uncompiled(self, input: Tensor) -> Tensor:
        """Return y [..., outputs]; under ZeRO-3, whose hooks break graphs anyway, never a part of a graph."""
        values = self.lift_weight.for_training(self.principal.for_autograd())
        return _PrincipalLinear.apply(input, values, self.bias, self)

    @property
    def lift_weight(self) -> PrincipalWeight:
        """The weight of the layer."""
        found: PrincipalWeight = self.__dict__[WEIGHTS]["weight"]
        return found

    def values_gradient(self, x: Tensor, grad_output: Tensor, dtype: torch.dtype) -> Tensor:
        """Return dL/dθ [k]; of dL/dW, which has the dtype of dL/dy, there is one tile of rows at a time.

        The index is fetched, and the attachment told.

        Args:
            x: [..., inputs].
            grad_output: dL/dy [..., outputs].
            dtype: of θ, and of what is returned.
        """
        weight = self.lift_weight
        meter = weight.owner.gradients
        if meter is not None and meter.measures:
            if meter.wants(weight):
                for start, part in self._gradient_tiles(x, grad_output):
                    meter.add(weight, start, part.abs_())
            return x.new_zeros(weight.entries(), dtype=dtype)
        index = weight.fetch_index()
        entries = access_to(index)
        gradient = x.new_empty(index.layout.entries, dtype=dtype)
        for start, part in self._gradient_tiles(x, grad_output):
            entries.gather(part, start, gradient)
        return gradient

    def _gradient_tiles(self, x: Tensor, grad_output: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield dL/dW a tile of rows at a time: its first flat position, and it, in memory that the next one takes."""
        grad_output = grad_output.reshape(-1, grad_output.shape[-1])  # [tokens, outputs]
        x = x.reshape(-1, x.shape[-1]).to(grad_output.dtype)  # [tokens, inputs]
        # dL/dW = dyᵀ x, and where it is stored transposed xᵀ dy.
        of_rows, of_columns = (x, grad_output) if self.transposed else (grad_output, x)
        m, n = self.principal.index.layout.rows, self.principal.index.layout.columns
        tiles = _row_tiles(m, n, HOST_GRADIENT_TILE if x.device.type == "cpu" else GRADIENT_TILE)
        tile = x.new_empty(tiles[0].stop, n)  # the first is the largest
        for rows in tiles:
            part = tile[: rows.stop - rows.start]
            torch.mm(of_rows[:, rows].T, of_columns, out=part)
            yield rows.start * n, part.view(-1)

    def take_weights(self, weights: Iterable[PrincipalWeight]) -> None:
        """Keep the weight, and get a handle by which a compiled graph finds the layer."""
        super().take_weights(weights)
        self.become_another()

    def become_another(self) -> None:
        """Get a handle of its own; else a compiled graph would take a copy for the original."""
        self.__dict__["lift_handle"] = handle_for(self)


class LiftLinear(PrincipalLayer, nn.Linear):
    """`nn.Linear`, weight [m, n] = [outputs, inputs]."""

    transposed = False


#: Linear layers of transformers by the names of their classes, so that transformers need not be imported -> whether the
#: weight is stored transposed. Conv1D is that of GPT-2: the low-rank approximation of Wᵀ is the transpose of that of W,
#: so the selection needs no transposition. FalconLinear is `nn.Linear` up to where its bias is added and rounded.
_OF_TRANSFORMERS = {
    "transformers.pytorch_utils.Conv1D": True,
    "transformers.models.falcon.modeling_falcon.FalconLinear": False,
}


def linear_class(kind: type[nn.Module]) -> type[PrincipalLayer] | None:
    """Return what manages the linear layers of a class by forming a tile of dL/dW at a time; None for other classes.

    Args:
        kind: `nn.Linear`, or one of the linear layers of transformers; not a class derived from them.
    """
    if kind is nn.Linear:
        return LiftLinear
    transposed = _OF_TRANSFORMERS.get(f"{kind.__module__}.{kind.__qualname__}")
    if transposed is None:
        return None
    return type(f"Lift{kind.__name__}", (PrincipalLayer, kind), {"transposed": transposed})
