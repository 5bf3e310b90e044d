"""LiftLinear: a linear layer that trains the principal values of its weight and nothing else.

      weight  W [m, n]  frozen          principal.values  θ [k]  trainable      principal.index  I [k]  frozen

      forward    y = x Wᵀ
      backward   dx = dy W;   dW = dyᵀ x, a tile of its rows after the other;             θ.grad = dW.flat[I]

θ is an ordinary parameter, so that ZeRO shards, reduces, clips, offloads and saves it as it does any other.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lift_ds.index.access import access_to
from lift_ds.index.dtensors import FSDP_AFTER_ATTACH
from lift_ds.index.encoding import CompactIndex
from lift_ds.model.compiled import TracedLinear, handle_for, input_gradient, product
from lift_ds.model.parameters import PrincipalSet
from lift_ds.model.partition import logical_shape

#: Name of the submodule with θ and I, and how the names of θ end.
PRINCIPAL = "principal"
VALUES = f"{PRINCIPAL}.values"
#: Names of what a managed layer has more than a plain one, in its state dict.
INDEX_WORDS = f"{PRINCIPAL}.index.words"
PRINCIPAL_KEYS = (VALUES, INDEX_WORDS)

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


class LayerOwner(Protocol):
    """What a layer asks of the attachment it belongs to."""

    #: Whether θ is away from its layer between steps (ZeRO-3).
    partitioned: bool
    #: What writes θ back after a step; None before an optimizer is bound.
    driver: Any
    #: Whether the layers have an index.
    selected: bool
    #: Measures the gradients of whole weights; None where nobody wants them.
    gradients: Any

    def require_selected(self) -> None:
        """Raise where the layers have no index yet."""

    def note_backward(self, layer: PrincipalLayer, index: CompactIndex) -> None:
        """Take note that a gradient has reached a layer, whose whole index this is."""


class PrincipalLayer(nn.Module):
    """What the managed layers share; `weight` keeps its name, its layout and its place in the state dict."""

    weight: Tensor
    bias: Any  # a parameter or None
    principal: PrincipalSet
    lift_attachment: LayerOwner
    #: By which a compiled graph finds this layer.
    lift_handle: Tensor
    #: Whether `weight` is [inputs, outputs].
    transposed: ClassVar[bool]

    def forward(self, input: Tensor) -> Tensor:
        # Autograd functions run below autocast: cast what is saved once, as autocast would cast it for the product.
        if not input.is_meta and torch.is_autocast_enabled(input.device.type):  # which knows no meta device
            input = input.to(torch.get_autocast_dtype(input.device.type))
        if torch.compiler.is_compiling() and not self.lift_attachment.partitioned:
            values = self._trained(self.principal.values)
            return TracedLinear.apply(input, values, self.weight, self.bias, self.lift_handle, self.transposed)
        return self.run_uncompiled(input)

    def run_uncompiled(self, input: Tensor) -> Tensor:
        """Return y [..., outputs]; under ZeRO-3, whose hooks break graphs anyway, never a part of a graph."""
        return _PrincipalLinear.apply(input, self._trained(self.principal.for_autograd()), self.bias, self)

    def _trained(self, values: nn.Parameter) -> nn.Parameter:
        """Return θ.

        Raises:
            RuntimeError: in training, when there is no index yet, or something has frozen θ.
        """
        if torch.is_grad_enabled():
            self.lift_attachment.require_selected()
        if self.training and torch.is_grad_enabled() and not values.requires_grad:
            raise RuntimeError(
                "LIFT is attached but not active: a layer's principal values do not require gradients any more. "
                "Adapters of PEFT, or requires_grad_(False), after lift_ds.attach do that; change the model before"
            )
        return values

    def values_gradient(self, x: Tensor, grad_output: Tensor, dtype: torch.dtype) -> Tensor:
        """Return dL/dθ [k]; of dL/dW, which has the dtype of dL/dy, there is one tile of rows at a time.

        The index is fetched, and the attachment told.

        Args:
            x: [..., inputs].
            grad_output: dL/dy [..., outputs].
            dtype: of θ, and of what is returned.
        """
        meter = self.lift_attachment.gradients
        if meter is not None and meter.measures:
            self._add_gradient(meter.total_of(self), x, grad_output)
            return x.new_zeros(self.entries(), dtype=dtype)
        index = CompactIndex(self.principal.index(), self.principal.index.layout)
        self.lift_attachment.note_backward(self, index)
        columns, entries = index.layout.columns, access_to(index)
        gradient = x.new_empty(index.layout.entries, dtype=dtype)
        for rows, part in self._gradient_tiles(x, grad_output):
            entries.gather(part.view(-1), rows.start * columns, gradient)
        return gradient

    def _add_gradient(self, total: Tensor | None, x: Tensor, grad_output: Tensor) -> None:
        """Add |dL/dW| to a total [m, n], where there is one."""
        if total is not None:
            for rows, part in self._gradient_tiles(x, grad_output):
                total[rows] += part.abs_()

    def _gradient_tiles(self, x: Tensor, grad_output: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield dL/dW a tile of rows at a time: which rows, and the tile, in memory that the next one takes."""
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
            yield rows, part

    def __deepcopy__(self, memo: dict[int, Any]) -> PrincipalLayer:
        copied = memo[id(self)] = object.__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        copied.__dict__["lift_handle"] = handle_for(copied)  # else a compiled graph would take it for the original
        return copied

    # FSDP marks every module it takes over: the earliest moment to say that it must not.
    @property
    def _is_fsdp_managed_module(self) -> bool:
        return False

    @_is_fsdp_managed_module.setter
    def _is_fsdp_managed_module(self, value: bool) -> None:
        raise ValueError(FSDP_AFTER_ATTACH)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}{INDEX_WORDS}" in state_dict:
            self.lift_attachment.selected = True
        elif f"{prefix}weight" in state_dict and self.lift_attachment.selected:
            self._take_values_from_weight()

    @torch.no_grad()
    def _take_values_from_weight(self) -> None:
        """Let θ follow a weight that was loaded by itself; the next step would write the old values back.

        Raises:
            RuntimeError: when the optimizer has master values of its own.
        """
        driver = self.lift_attachment.driver
        if driver is not None and not driver.store.values_are_master:
            raise RuntimeError(
                "the state dict of a plain model was loaded after the optimizer's master values were made from other "
                "weights, which the next step would bring back; load it before lift_ds.initialize or the training"
            )
        held, values = self.weight.view(-1)[self.principal_index.long()], self.principal_values  # [k]
        # Where the weight is what θ was rounded to, θ is the better value.
        values.copy_(torch.where(values.to(held.dtype) == held, values, held.to(values.dtype)))

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

#: Class of a layer as the model has it -> class that manages it. The class is swapped in place, so that the module
#: object, its parameters, hooks and names stay what they were.
_MANAGED: dict[type[nn.Module], type[PrincipalLayer]] = {nn.Linear: LiftLinear}

#: What the layers that can be managed are called.
MANAGED_KINDS = ("Linear", *(name.rpartition(".")[2] for name in _OF_TRANSFORMERS))


def managed_class(kind: type[nn.Module]) -> type[PrincipalLayer] | None:
    """Return the class that manages layers of a class; None where there is none.

    Args:
        kind: `nn.Linear`, or one of the linear layers of transformers; not a class derived from them.
    """
    transposed = _OF_TRANSFORMERS.get(f"{kind.__module__}.{kind.__qualname__}")
    if kind not in _MANAGED and transposed is not None:
        name = f"Lift{kind.__name__}"
        _MANAGED[kind] = type(name, (PrincipalLayer, kind), {"transposed": transposed, "__module__": __name__})
        globals()[name] = _MANAGED[kind]
    return _MANAGED.get(kind)


def unmanage(layer: Any) -> None:
    """Give a managed layer the class it had before, without θ and I."""
    delattr(layer, PRINCIPAL)
    layer.__class__ = next(plain for plain, managed in _MANAGED.items() if managed is type(layer))


def __getattr__(name: str) -> Any:
    """Return a class that `managed_class` makes, for those who unpickle one of its layers."""
    for plain in _OF_TRANSFORMERS:
        module, _, kind = plain.rpartition(".")
        if name == f"Lift{kind}":
            return managed_class(getattr(importlib.import_module(module), kind))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def principal_layers(model: nn.Module) -> Iterator[tuple[str, PrincipalLayer]]:
    """Yield (dotted name, layer) of the managed layers, in the order of the model's modules."""
    for name, module in model.named_modules():
        if isinstance(module, PrincipalLayer):
            yield name, module
