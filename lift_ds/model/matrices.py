"""Which parameters of a module are matrices, and how many of what shape.

    weight of a linear layer, or of one derived from it     [m, n]             one matrix
    weight of a convolution                                 [m, c, *kernel]    one matrix [m, c * kernel]
    projections of nn.MultiheadAttention                    [m, n]             one matrix
    a parameter of three dimensions of any other module     [E, m, n]          a stack of E matrices
    one of two dimensions whose name says "proj"            [m, n]             one matrix

A side of length 1 is no side of a matrix: such parameters are vectors, or positions.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from lift_ds.model.layers import linear_class
from lift_ds.model.partition import logical_shape

#: Matrices of nn.MultiheadAttention beside its output projection, which is a linear layer.
_OF_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")

#: How many matrices, their rows and columns.
Sizes = tuple[int, int, int]


def matrices_in(module: nn.Module, name: str, parameter: Any, *, every: bool = False) -> Sizes | None:
    """Return how many matrices a parameter of a module holds, and of what shape; None where it holds none.

    Args:
        module: that has the parameter itself.
        name: of the parameter there.
        parameter: whole or partitioned.
        every: whether a parameter of two dimensions of any other module is a matrix too; some are routers, some are
            tables. Embeddings are none in any case.
    """
    shape = logical_shape(parameter)
    if not parameter.is_floating_point():
        return None
    sizes: tuple[int, ...] | None = None
    if isinstance(module, nn.Linear) or linear_class(type(module)) is not None:
        sizes = (1, *shape) if name == "weight" and len(shape) == 2 else None
    elif isinstance(module, _ConvNd):
        sizes = (1, shape[0], math.prod(shape[1:])) if name == "weight" else None
    elif isinstance(module, nn.MultiheadAttention):
        sizes = (1, *shape) if name in _OF_ATTENTION else None
    elif len(shape) == 3:
        sizes = tuple(shape)
    elif (
        len(shape) == 2 and "bias" not in name and ("proj" in name or (every and not isinstance(module, nn.Embedding)))
    ):
        sizes = (1, *shape)
    if sizes is None or min(sizes[1:]) == 1 or shape[0] == 1:
        return None
    matrices, rows, columns = sizes
    return matrices, rows, columns
