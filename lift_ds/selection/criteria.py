"""Criteria: by which score the entries of a matrix are ranked. The largest scores are selected.

    principal    |W'|, the low-rank approximation: LIFT (section 3 of the paper)
    magnitude    |W|
    smallest     -|W'|: what the published code trains by default, the opposite of the paper
    random       numbers drawn by the seed, the same ones all the run long
    gradient     mean |dL/dW| over some batches

A criterion is one function with a name. Everything after the scores is the same for all: the budget, blocks, ties,
refreshes, sharding and checkpoints. One more takes a few lines:

    from lift_ds.selection.criteria import Matrix, Scores, criterion

    @criterion("outlying")
    def outlying(matrix: Matrix) -> Scores:
        mean = matrix.weight.float().mean()
        return lambda rows, columns: (matrix.entries(rows, columns) - mean).abs()

    config = lift_ds.LiftConfig(density=0.05, criterion="outlying")
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lift_ds.config import CRITERIA
from lift_ds.selection.low_rank import Factors
from lift_ds.selection.precision import working_precision

#: Some rows, or some columns, of a matrix: a range of them, or their numbers, int64.
Part = slice | Tensor

#: Gives the scores of the entries in some rows and some columns, [rows, columns], a tensor of its own; no NaN. Asked
#: for a tile at a time, so that the scores of a whole matrix are never there at once.
Scores = Callable[[Part, Part], Tensor]


@dataclass(frozen=True)
class Matrix:
    """What a criterion may look at.

    Args:
        weight: [m, n], finite.
        factors: [m, r] and [r, n], whose product is W'; None where W' = W, or where the criterion asks for none.
        name: dotted name of the layer.
        seed: of the configuration.
        gradient: mean |dL/dW|, float32 [m, n]; None where the criterion does not ask for it.
    """

    weight: Tensor
    factors: Factors | None
    name: str
    seed: int
    gradient: Tensor | None = None

    def entries(self, rows: Part, columns: Part) -> Tensor:
        """Return W[rows][:, columns] in float32, of a float64 matrix in float64; perhaps a view of it, so not to be
        changed in place."""
        return working_precision(self.weight[rows][:, columns])

    def approximation(self, rows: Part, columns: Part) -> Tensor:
        """Return W'[rows][:, columns], likewise."""
        if self.factors is None:
            return self.entries(rows, columns)
        return self.factors[0][rows] @ self.factors[1][:, columns]


@dataclass(frozen=True)
class Criterion:
    """A criterion and what it asks for.

    Args:
        scores: gives the scores of a matrix.
        low_rank: whether it looks at W'. Where it does not, nothing is factored.
        largest: whether it takes the largest entries of abs(W'), so that the solver "chebyshev" can tell when it is
            right: it watches those.
        gradient: whether it looks at gradients. Then somebody has to give batches, before the first step.
    """

    scores: Callable[[Matrix], Scores]
    low_rank: bool = False
    largest: bool = False
    gradient: bool = False


_REGISTERED: dict[str, Criterion] = {}


def criterion(
    name: str, *, low_rank: bool = False, largest: bool = False, gradient: bool = False
) -> Callable[[Callable[[Matrix], Scores]], Callable[[Matrix], Scores]]:
    """Register a criterion under a name; on every rank, before a configuration names it.

    Args:
        name: what `LiftConfig.criterion` calls it.
        low_rank: as in `Criterion`.
        largest: as in `Criterion`.
        gradient: as in `Criterion`.

    Returns:
        A decorator of a function that takes a `Matrix` and returns its `Scores`. They have to depend on the matrix
        alone, so that every rank would select the same.

    Raises:
        ValueError: the name is taken.
    """

    def register(scores: Callable[[Matrix], Scores]) -> Callable[[Matrix], Scores]:
        if name in _REGISTERED:
            raise ValueError(f"criterion {name!r} is there already; name it otherwise than {', '.join(_REGISTERED)}")
        _REGISTERED[name] = Criterion(scores, low_rank, largest, gradient)
        if name not in CRITERIA:
            CRITERIA.append(name)
        return scores

    return register


def criterion_named(name: str) -> Criterion:
    """Return a registered criterion."""
    return _REGISTERED[name]


@criterion("principal", low_rank=True, largest=True)
def principal(matrix: Matrix) -> Scores:
    """The principal weights: the largest entries of abs(W')."""
    if matrix.factors is None:
        return magnitude(matrix)
    return lambda rows, columns: matrix.approximation(rows, columns).abs_()


@criterion("magnitude")
def magnitude(matrix: Matrix) -> Scores:
    """The largest entries of abs(W)."""
    return lambda rows, columns: matrix.entries(rows, columns).abs()


@criterion("smallest", low_rank=True)
def smallest(matrix: Matrix) -> Scores:
    """The smallest entries of abs(W')."""
    return lambda rows, columns: matrix.approximation(rows, columns).abs().neg_()


@criterion("gradient", gradient=True)
def by_gradient(matrix: Matrix) -> Scores:
    """The largest mean |dL/dW|."""
    measured = matrix.gradient
    assert measured is not None, "measured before the selection"
    return lambda rows, columns: measured[rows][:, columns]


@criterion("random")
def random(matrix: Matrix) -> Scores:
    """Numbers that depend on seed, name of the matrix and position alone: not on the device, nor on who computes them.

    The row number is mixed with a key, the result with the column number, and that is mixed again, by the finalizer of
    MurmurHash3 (Austin Appleby, public domain).
    """
    key = _signed(zlib.crc32(f"{matrix.seed} {matrix.name}".encode()))
    (m, n), device = matrix.weight.shape, matrix.weight.device

    def scores(rows: Part, columns: Part) -> Tensor:
        row = torch.arange(m, dtype=torch.int32, device=device)[rows]
        column = torch.arange(n, dtype=torch.int32, device=device)[columns]
        mixed = _mix(_mix(row ^ key)[:, None] ^ column)
        return ((mixed >> 8) & 0xFFFFFF).float()  # 24 bits, which float32 holds

    return scores


def _mix(x: Tensor) -> Tensor:
    """Mix the bits of int32 numbers; products wrap around."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = x ^ _shifted(x, shift)
        x = x * _signed(factor)
    return x ^ _shifted(x, 16)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift to the right as if the numbers were unsigned."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _signed(number: int) -> int:
    """Return the int32 with the bits of an unsigned number."""
    return number - 2**32 if number >= 2**31 else number
