"""ManagedModule: what modules with managed weights share.

The class of a module is swapped in place, so that the module object, its parameters, hooks and names stay what they
were. `layers` and `readings` have the classes, `kinds` says which one a module gets.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from torch import nn

from lift_ds.index.dtensors import FSDP_AFTER_ATTACH
from lift_ds.model.weights import INDEX_WORDS, PRINCIPAL, WEIGHTS, PrincipalWeight


class ManagedModule(nn.Module):
    """A module with managed weights."""

    #: The class it had before.
    lift_plain: ClassVar[type[nn.Module]]
    #: Whether it is called, and not only its weights read.
    lift_called: ClassVar[bool]
    #: Makes an empty module of the managed class of a plain one, by the managed parameters and whether it is called.
    lift_empty: ClassVar[Callable[..., nn.Module]]

    def take_weights(self, weights: Iterable[PrincipalWeight]) -> None:
        """Keep the managed weights of this module, by the names of their parameters."""
        self.__dict__[WEIGHTS] = {weight.parameter: weight for weight in weights}

    def __deepcopy__(self, memo: dict[int, Any]) -> ManagedModule:
        copied: ManagedModule = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        copied.become_another()
        return copied

    def become_another(self) -> None:
        """Give a copy what it must not share with the module it is a copy of."""

    def __reduce__(self) -> tuple[Any, ...]:
        return self.lift_empty, (self.lift_plain, tuple(self.__dict__[WEIGHTS]), self.lift_called), self.__dict__

    # FSDP marks every module it takes over: the earliest moment to say that it must not.
    @property
    def _is_fsdp_managed_module(self) -> bool:
        return False

    @_is_fsdp_managed_module.setter
    def _is_fsdp_managed_module(self, value: bool) -> None:
        raise ValueError(FSDP_AFTER_ATTACH)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        for weight in self.__dict__[WEIGHTS].values():
            words = f"{prefix}{weight.principal_name.removesuffix(PRINCIPAL)}{INDEX_WORDS}"
            if words in state_dict:
                weight.owner.selected = True
            elif f"{prefix}{weight.parameter}" in state_dict and weight.owner.selected:
                weight.take_values_from_weight()
