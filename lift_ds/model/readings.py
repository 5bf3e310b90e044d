"""Modules that keep their own forward, and read managed weights in it: stacks of experts, convolutions, and others.

A weight that such a forward reads is a tensor of autograd whose gradient is that of θ:

      forward    W = view(θ)         the weights as they are; no copy
      backward   dW, dense           formed by the model's own operators, and freed once θ's entries are gathered
                 θ.grad = dW.flat[I]

A forward may also take one matrix after the other out of a stack, as `W[e]`. Then the gradient of each goes into θ's by
itself, and there is one dense matrix at a time.

All readings of a weight in one forward share a `_Reading`, so that in backward the index is fetched once, however many
experts were hit. On several ranks these numbers differ, and what is fetched must not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lift_ds.index.access import Access, access_to
from lift_ds.model.managed import ManagedModule
from lift_ds.model.weights import WEIGHTS, PrincipalWeight

#: Where a module keeps the readings of the forward it is in: name of the parameter -> what the forward reads.
_OPEN = "lift_readings"


class _Reading:
    """One use of a weight, from a forward to its backward.

    Args:
        weight: that is read.
    """

    def __init__(self, weight: PrincipalWeight) -> None:
        self.weight = weight
        self._access: Access | None = None
        self._gradient: Tensor | None = None

    def add(self, gradient: Tensor, start: int) -> None:
        """Take the gradient of a part of W.

        Args:
            gradient: of some matrices of W, in its order.
            start: flat position of its first entry.
        """
        piece = gradient.contiguous().view(-1)
        meter = self.weight.owner.gradients
        if meter is not None and meter.measures:
            meter.add(self.weight, start, piece.abs())
            return
        if self._access is None:
            self._access = access_to(self.weight.fetch_index())
        if self._gradient is None:
            self._gradient = piece.new_zeros(self.weight.entries())
            self._access.gather(piece, start, self._gradient)
            return
        # What is outside of the piece stays zero; what is inside may have been read before.
        own = torch.zeros_like(self._gradient)
        self._access.gather(piece, start, own)
        self._gradient += own

    def finish(self, values: Tensor) -> Tensor:
        """Return dL/dθ [k] in the dtype of θ, and forget the index."""
        gradient = self._gradient
        self._access = self._gradient = None
        if gradient is None:
            return values.new_zeros(self.weight.entries())
        return gradient.to(values.dtype)


class _Values(torch.autograd.Function):
    """θ as all readings of one forward share it; what they have gathered becomes its gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, reading: _Reading) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.reading = reading
        ctx.like = values.new_empty(0)
        return values.new_empty(1).expand(values.shape)  # nobody reads it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor, None]:
        return ctx.reading.finish(ctx.like), None


class _View(torch.autograd.Function):
    """W, or one matrix of it, with a gradient for θ."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, reading: _Reading, number: int | None) -> Tensor:
        ctx.reading, ctx.number = reading, number
        held = reading.weight.weight.detach()
        return held.view_as(held) if number is None else held[number]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.reading.add(gradient, 0 if ctx.number is None else ctx.number * gradient.numel())
        return None, None, None


class _ReadWeight(Tensor):
    """W as a forward reads it; `W[e]` is a reading of its own."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    _lift: tuple[Tensor, _Reading]

    def __getitem__(self, place: Any) -> Tensor:
        number = _matrix_number(place)
        if number is None or self.dim() < 3:
            return super().__getitem__(place)
        values, reading = self._lift
        return _View.apply(values, reading, range(self.shape[0])[number])


def _matrix_number(place: Any) -> int | None:
    """Return the number that an index is; None where it is no single number."""
    if isinstance(place, Tensor) and place.dim() == 0 and place.dtype in (torch.int32, torch.int64):
        return int(place)
    return place if isinstance(place, int) and not isinstance(place, bool) else None


def _read(weight: PrincipalWeight) -> Tensor:
    """Return W for the forward of a model."""
    if not torch.is_grad_enabled():
        return weight.weight
    values = weight.for_training(weight.principal.for_autograd())
    if not values.requires_grad:
        return weight.weight
    reading = _Reading(weight)
    shared = _Values.apply(values, reading)
    read = _View.apply(shared, reading, None).as_subclass(_ReadWeight)
    read._lift = (shared, reading)
    return read


class ReadModule(ManagedModule):
    """A module whose managed weights its own forward reads."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._reading(), _without_keeping([*self.__dict__[WEIGHTS].values()]):
            return super().forward(*args, **kwargs)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Let the module's weights be read as tensors of autograd within the context."""
        before = self.__dict__.get(_OPEN)
        self.__dict__[_OPEN] = {}
        try:
            yield
        finally:
            self.__dict__[_OPEN] = before

    def read(self, parameter: str) -> Tensor:
        """Return a managed weight, as an attribute of the module gives it.

        Also a module around this one may read it in training, without calling this one; that is a reading of its own.
        """
        weight, opened = self.__dict__[WEIGHTS][parameter], self.__dict__.get(_OPEN)
        if opened is None:
            return _read(weight) if self.training else weight.weight
        if parameter not in opened:
            opened[parameter] = _read(weight)
        return opened[parameter]


def _without_keeping(weights: list[PrincipalWeight]) -> AbstractContextManager[object]:
    """Let autograd keep no part of a partitioned weight from forward to backward, but where it lies.

    A view would keep the weight whole that ZeRO-3 has gathered for the forward; in backward it gathers it again. Where
    other hooks see what is kept, as those of activation checkpointing, theirs are left alone: they would not see it.
    """
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    if hooked or not torch.is_grad_enabled() or not any(weight.owner.partitioned for weight in weights):
        return nullcontext()
    of_storage = {weight.weight.untyped_storage().data_ptr(): weight for weight in weights}

    def pack(tensor: Tensor) -> Any:
        weight = of_storage.get(tensor.untyped_storage().data_ptr()) if tensor.numel() else None
        if weight is None or type(tensor) not in (Tensor, _ReadWeight):
            return tensor
        return weight, tensor.storage_offset(), tensor.shape, tensor.stride()

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        weight, offset, shape, stride = packed
        held = weight.weight.detach()
        return held.as_strided(shape, stride, offset)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def read_class(kind: type[nn.Module], parameters: tuple[str, ...]) -> type[ReadModule]:
    """Return what manages modules of a class that read some of their parameters.

    Args:
        kind: the class.
        parameters: names of those that are managed.
    """
    return type(f"Lift{kind.__name__}", (ReadModule, kind), {name: _property(name) for name in parameters})


def _property(name: str) -> property:
    def read(self: Any) -> Tensor:
        return self.read(name)

    def assign(self: Any, value: Any) -> None:
        self.register_parameter(name, value)

    return property(read, assign)
