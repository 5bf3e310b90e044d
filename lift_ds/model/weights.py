"""PrincipalWeight: a frozen weight W of a module, and the principal values θ that are trained in its place.

    module.weight            W [m, n], frozen            module.principal              θ [k] and I of W
    module.gate_up_proj      W [E, m, n], frozen         module.gate_up_proj_principal  θ [E * k] and I of W

A stack holds E matrices, which are selected in by themselves: each has its own k entries. Its θ and I are those of its
matrices, one after the other, and one parameter each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lift_ds.index.access import access_to
from lift_ds.index.encoding import CompactIndex, IndexLayout
from lift_ds.model.parameters import PrincipalSet
from lift_ds.model.partition import logical_shape

#: Name of the submodule with θ and I of a parameter called "weight"; of another one its name comes first. The names of
#: all θ end alike.
PRINCIPAL = "principal"
VALUES = f"{PRINCIPAL}.values"
#: How the names of what a managed module has more than a plain one end, in its state dict.
INDEX_WORDS = f"{PRINCIPAL}.index.words"
PRINCIPAL_KEYS = (VALUES, INDEX_WORDS)

#: Where a module keeps its managed weights: name of the parameter -> PrincipalWeight.
WEIGHTS = "lift_weights"


class Owner(Protocol):
    """What a weight asks of the attachment it belongs to."""

    #: Whether θ is away from its module between steps (ZeRO-3).
    partitioned: bool
    #: What writes θ back after a step; None before an optimizer is bound.
    driver: Any
    #: Whether the weights have an index.
    selected: bool
    #: Measures the gradients of whole weights; None where nobody wants them.
    gradients: Any

    def require_selected(self) -> None:
        """Raise where the weights have no index yet."""

    def note_backward(self, weight: PrincipalWeight, index: CompactIndex) -> None:
        """Take note that a gradient has reached a weight, whose whole index this is."""


class PrincipalWeight:
    """One managed weight.

    Args:
        name: dotted, by which the log calls it: that of the layer where the parameter is its "weight", else that of
            the parameter.
        module: that has it.
        parameter: what it is called there.

    Attributes:
        owner: the attachment; set when the model is attached to.
    """

    owner: Owner

    def __init__(self, name: str, module: nn.Module, parameter: str) -> None:
        self.name = name
        self.module = module
        self.parameter = parameter

    @property
    def weight(self) -> Any:
        """W, as the module has it at this moment."""
        return self.module._parameters[self.parameter]

    @property
    def full_name(self) -> str:
        """The dotted name of W in the model."""
        return f"{self.name}.{self.parameter}" if self.parameter == "weight" else self.name

    @property
    def principal_name(self) -> str:
        """What the submodule with θ and I is called in the module."""
        return principal_name(self.parameter)

    @property
    def principal(self) -> PrincipalSet:
        """θ and I."""
        found = self.module._modules[self.principal_name]
        assert isinstance(found, PrincipalSet)
        return found

    @property
    def layout(self) -> IndexLayout:
        """Of the index: its `rows` are those of all matrices of a stack."""
        return self.principal.index.layout

    @property
    def matrices(self) -> int:
        """E of a stack, else 1."""
        return self.layout.matrices

    @property
    def principal_values(self) -> nn.Parameter:
        """θ [k], in the dtype of training."""
        return self.principal.values

    @property
    def principal_index(self) -> Tensor:
        """I [k], flat row-major positions in the weight, ascending; where its words are whole."""
        return self.principal.index.positions()

    def shape(self) -> torch.Size:
        """Return [m, n] of one matrix, wherever W is."""
        return torch.Size([self.layout.of_one.rows, self.layout.columns])

    def elements(self) -> int:
        """Return how many entries W has, wherever it is."""
        return logical_shape(self.weight).numel()

    def entries(self) -> int:
        """Return how many of them are trained, of all matrices together."""
        return self.principal.index.entries

    def matrix_names(self) -> list[str]:
        """Return the names of its matrices: its own, and of a stack that with a number."""
        return matrix_names(self.name, self.matrices)

    @torch.no_grad()
    def holds_its_values(self, index: CompactIndex) -> bool:
        """Tell whether W.flat[I] = θ, in the dtype of W; all three whole."""
        held = self.weight.new_empty(index.layout.entries)
        access_to(index).gather(self.weight.detach().view(-1), 0, held)
        return torch.equal(held, self.principal_values.to(held.dtype))

    def for_training(self, values: nn.Parameter) -> nn.Parameter:
        """Return θ, to be an input of a node of autograd.

        Args:
            values: θ, as the node is to have it.

        Raises:
            RuntimeError: in training, when there is no index yet, or something has frozen θ.
        """
        if torch.is_grad_enabled():
            self.owner.require_selected()
        if self.module.training and torch.is_grad_enabled() and not values.requires_grad:
            raise RuntimeError(
                "LIFT is attached but not active: a layer's principal values do not require gradients any more. "
                "Adapters of PEFT, or requires_grad_(False), after lift_ds.attach do that; change the model before"
            )
        return values

    def fetch_index(self) -> CompactIndex:
        """Return the index, whole, in a backward that has reached this weight, and tell the attachment."""
        index = CompactIndex(self.principal.index(), self.layout)
        self.owner.note_backward(self, index)
        return index

    @torch.no_grad()
    def take_values_from_weight(self) -> None:
        """Let θ follow a weight that was loaded by itself; the next step would write the old values back.

        Raises:
            RuntimeError: when the optimizer has master values of its own.
        """
        driver = self.owner.driver
        if driver is not None and not driver.store.values_are_master:
            raise RuntimeError(
                "the state dict of a plain model was loaded after the optimizer's master values were made from other "
                "weights, which the next step would bring back; load it before lift_ds.initialize or the training"
            )
        held, values = self.weight.view(-1)[self.principal_index.long()], self.principal_values  # [k]
        # Where the weight is what θ was rounded to, θ is the better value.
        values.copy_(torch.where(values.to(held.dtype) == held, values, held.to(values.dtype)))


class PrincipalMatrix(NamedTuple):
    """One matrix of a managed weight."""

    weight: PrincipalWeight
    number: int


def is_principal(key: str) -> bool:
    """Tell whether a key of a state dict is that of θ or I."""
    return any(key == own or key.endswith((f".{own}", f"_{own}")) for own in PRINCIPAL_KEYS)


def matrix_names(name: str, matrices: int) -> list[str]:
    """Return the names of the matrices of a weight: its own, and of a stack that with a number.

    Args:
        name: of the weight.
        matrices: how many it has.
    """
    return [name] if matrices == 1 else [f"{name}[{number}]" for number in range(matrices)]


def principal_name(parameter: str) -> str:
    """Return what the submodule with θ and I of a parameter is called."""
    return PRINCIPAL if parameter == "weight" else f"{parameter}_{PRINCIPAL}"


def principal_weights(model: nn.Module) -> Iterator[tuple[str, PrincipalWeight]]:
    """Yield (name, weight) of all that is managed, in the order of the model's modules."""
    for module in model.modules():
        for weight in module.__dict__.get(WEIGHTS, {}).values():
            yield weight.name, weight


def matrices_of(weights: dict[str, PrincipalWeight]) -> dict[str, PrincipalMatrix]:
    """Return the matrices of some weights by name."""
    return {
        name: PrincipalMatrix(weight, number)
        for weight in weights.values()
        for number, name in enumerate(weight.matrix_names())
    }
