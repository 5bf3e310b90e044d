"""Compiles the Triton kernel for GPUs that need not be there, by the arguments of its own launches.

python compile_kernels.py TARGET RESULTS.json     RESULTS: {case: the kinds of code it was compiled to, or an error}

A process of its own: where TRITON_INTERPRET is set, triton has replaced its compiler by the interpreter.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from lift_ds.index.encoding import CompactIndex, IndexLayout, encode
from lift_ds.index.kernels.triton_access import TritonAccess, copy_entries

#: Ampere, Hopper, Blackwell.
TARGETS = {f"sm_{number}": GPUTarget("cuda", number, 32) for number in (80, 90, 100)}

#: Of the piece and of the values: any two that a model may have, and float64 by itself.
_MIXED = (torch.bfloat16, torch.float16, torch.float32)
DTYPES = [*itertools.product(_MIXED, _MIXED), (torch.float64, torch.float64)]
BLOCK_SHAPES = ((1, 1), (4, 4), (3, 5))
#: Columns of the grid of blocks in an index of 16-bit columns, and in one of wide positions.
GRIDS = (8, 70_000)


class CompileOnly:
    """What triton asks of a driver before it launches: a device that is only compiled for."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def entries_of(block_shape: tuple[int, int], grid_columns: int) -> tuple[TritonAccess, int, int]:
    """Entries of one block in a matrix of two rows of blocks; with how many entries, and the size of the matrix."""
    (p, q), columns = block_shape, grid_columns * block_shape[1]
    positions = (torch.arange(p)[:, None] * columns + torch.arange(q)).flatten()
    layout = IndexLayout(2 * p, columns, positions.numel(), block_shape)
    words = encode(positions, 2 * p, columns, block_shape)
    return TritonAccess(CompactIndex(words, layout)), positions.numel(), 2 * p * columns


def compiled(
    entries: TritonAccess, count: int, size: int, piece: torch.dtype, values: torch.dtype, gather: bool
) -> Any:
    """The code of one specialisation, by kind; the message where there is none."""
    launch = entries.launch(torch.empty(size, dtype=piece), 0, torch.empty(count, dtype=values), gather=gather)
    try:
        kernel = copy_entries.warmup(*launch.arguments, grid=(launch.programs,), **launch.constants)
    except triton.CompilationError as error:
        return str(error)
    return sorted(kernel.asm)


def main(target: str, results: Path) -> None:
    triton.runtime.driver.set_active(CompileOnly(TARGETS[target]))
    found = {}
    for block_shape, grid_columns in itertools.product(BLOCK_SHAPES, GRIDS):
        entries, count, size = entries_of(block_shape, grid_columns)
        for (piece, values), gather in itertools.product(DTYPES, (True, False)):
            case = f"{block_shape} {grid_columns} {piece} {values} {'gather' if gather else 'put'}"
            found[case] = compiled(entries, count, size, piece, values, gather)
    results.write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
