"""Leaf modules of ZeRO-3, whose parameters are fetched as one: `set_z3_leaf_modules`, `"leaf_module"`, and those that
`"stage3_module_granularity_threshold"` makes.
"""

from __future__ import annotations

from typing import Any

from deepspeed.utils import get_z3_leaf_modules
from torch import nn

from lift_ds.model.parameters import PrincipalSet
from lift_ds.model.weights import principal_weights


class _NeverALeaf:
    """DeepSpeed's mark of a leaf module, for one that must not be a leaf.

    Nothing calls a `PrincipalSet`: as a leaf it would never fetch the index below it, nor reduce the gradient of θ.
    """

    def __get__(self, module: nn.Module | None, kind: type) -> bool:
        return False

    def __set__(self, module: nn.Module, value: bool) -> None:
        pass


PrincipalSet._z3_leaf = _NeverALeaf()  # type: ignore[attr-defined]


def let_gradients_reach_leaves(model: nn.Module) -> None:
    """Let the inputs of leaf modules require gradients where these hold managed layers.

    DeepSpeed reduces the gradients of a leaf when those of its inputs are there. The first decoder layer's inputs would
    have none, since the embeddings are frozen, and its gradients would be taken before they are complete.

    Args:
        model: the model LIFT is attached to, or a wrapper of it.

    Raises:
        ValueError: the model has no way to make its inputs require gradients.
    """
    leaves = [leaf for leaf in get_z3_leaf_modules(model) if next(principal_weights(leaf), None) is not None]
    if not leaves:
        return
    holders: list[Any] = [module for module in model.modules() if hasattr(module, "enable_input_require_grads")]
    if not holders:
        raise ValueError(
            f"{type(leaves[0]).__name__} is a leaf module of ZeRO-3 with layers that LIFT manages, and "
            f"{type(model).__name__} has no enable_input_require_grads(), without which the gradients of the first one "
            "would be lost; leave set_z3_leaf_modules out"
        )
    holders[0].enable_input_require_grads()
