"""Which class manages the weights of a module: the one place that chooses.

    `nn.Linear`, and transformers' own    LiftLinear, ...    forms dL/dW a tile of rows at a time, and compiles
    any other module                      a ReadModule       keeps its forward; dL/dW of a weight is whole for a moment

Some linear layers are never called: the module around them reads their weight. They are of the second kind.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from lift_ds.model.layers import linear_class
from lift_ds.model.managed import ManagedModule
from lift_ds.model.readings import read_class
from lift_ds.model.weights import WEIGHTS, PrincipalWeight

#: How the names of linear layers end that are never called, in the state-space models of transformers.
_READ_FROM_OUTSIDE = ("dt_proj",)


@functools.cache
def _managed_class(kind: type[nn.Module], parameters: tuple[str, ...], called: bool) -> type[ManagedModule]:
    linear = linear_class(kind) if called and parameters == ("weight",) else None
    found = cast(Any, linear or read_class(kind, parameters))
    found.lift_plain, found.lift_called, found.lift_empty = kind, called, staticmethod(empty_module)
    return cast(type[ManagedModule], found)


def managed_class(kind: type[nn.Module], parameters: tuple[str, ...], called: bool = True) -> type[ManagedModule]:
    """Return the class that manages modules of a class.

    Args:
        kind: as the model has it.
        parameters: names of the managed ones.
        called: whether the modules are called; else others read their weights.
    """
    return _managed_class(cast(Any, kind), parameters, called)


def empty_module(kind: type[nn.Module], parameters: tuple[str, ...], called: bool) -> nn.Module:
    """Return a module of the class that manages another, with nothing in it, for those who unpickle one."""
    managed = managed_class(kind, parameters, called)
    return managed.__new__(managed)


def manage(module: Any, weights: Sequence[PrincipalWeight]) -> ManagedModule:
    """Give a module the class that manages some of its weights."""
    called = not weights[0].name.endswith(_READ_FROM_OUTSIDE)
    module.__class__ = managed_class(type(module), tuple(weight.parameter for weight in weights), called)
    assert isinstance(module, ManagedModule)
    module.take_weights(weights)
    return module


def unmanage(module: Any) -> None:
    """Give a managed module the class it had before, without θ and I."""
    for weight in module.__dict__.pop(WEIGHTS).values():
        delattr(module, weight.principal_name)
    module.__dict__.pop("lift_handle", None)
    module.__class__ = module.lift_plain
