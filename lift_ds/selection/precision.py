"""In which precision selections are computed, and how many rows of a matrix at a time.

A matrix is worked through in tiles, so that nothing as large as it is ever formed beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

#: Entries of a tile where nothing asks for smaller ones: 64 MiB in float32.
TILE_ENTRIES = 2**24

#: Backends that may round the factors of a float32 product to fewer bits (TF32, bf16).
_BACKENDS = ("cuda", "mkldnn")


def tiles(length: int, other: int, entries: int = TILE_ENTRIES) -> Iterator[slice]:
    """Cut one side of a matrix.

    Args:
        length: of the side that is cut.
        other: length of the other side.
        entries: of a tile, at most (but at least one row or column).

    Yields:
        Slices that cover range(length), in order.
    """
    step = max(1, entries // other)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def working_precision(weight: Tensor) -> Tensor:
    """Return the matrix in the dtype selections are computed in: float64 stays, all else becomes float32."""
    return weight if weight.dtype == torch.float64 else weight.float()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Within the context products of float32 matrices keep all their digits, whatever the training around allows.

    Afterwards every switch is as it was, by which of torch's interfaces it was set: what followed a switch above it
    follows it again.

    Args:
        device: where the matrices are.
    """
    before = [_own_setting(backend) for backend in _BACKENDS]
    _set_products(["ieee"] * len(_BACKENDS))
    # The old switch too: products on CUDA refuse to run while it says something else than the new one. With the new
    # ones at "ieee" it can be read, also where they contradicted it before.
    old_switch = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(old_switch)  # sets the new ones as well
        _set_products(before)


def _set_products(settings: Sequence[str]) -> None:
    for backend, setting in zip(_BACKENDS, settings, strict=True):
        _switch(backend, "matmul").fp32_precision = setting


def _own_setting(backend: str) -> str:
    """Return how products of a backend are computed by their own switch: "none" where they follow those above it.

    A switch that follows another one reads as that one does, so those above are put to "none" for a moment.
    """
    above = [_switch("generic", "all"), _switch(backend, "all")]
    settings = []
    for switch in above:
        settings.append(switch.fp32_precision)
        switch.fp32_precision = "none"
    own = _switch(backend, "matmul").fp32_precision
    for switch, setting in zip(above, settings, strict=True):
        switch.fp32_precision = setting
    return own


def _switch(backend: str, operations: str) -> Any:
    """Return one of torch's switches of float32 precision; not all of them have a public name that works."""
    return torch.backends._FP32Precision(backend, operations)


def largest_magnitude(weight: Tensor, tile_entries: int = TILE_ENTRIES) -> float:
    """Return the largest absolute value of a matrix; NaN where it has one. One synchronisation of the device.

    Args:
        weight: [m, n], any floating dtype.
        tile_entries: entries that are looked at in one operation.
    """
    rows, columns = weight.shape
    extremes = [torch.stack(torch.aminmax(weight[tile])) for tile in tiles(rows, columns, tile_entries)]
    return float(torch.stack(extremes).abs().amax())


def unit_scale(weight: Tensor) -> float:
    """Return the power of two that brings the largest entry of a finite matrix into [0.5, 1)."""
    largest = largest_magnitude(weight)
    return math.ldexp(1.0, max(-126, min(126, -math.frexp(largest)[1]))) if largest else 1.0
