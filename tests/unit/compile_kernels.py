"""Compiles the Triton kernel for GPUs that need not be there, by the arguments of its own launches.

python compile_kernels.py TARGET RESULTS.json     RESULTS: {case: what the kernel takes of a GPU, or an error}

A process of its own: where TRITON_INTERPRET is set, triton has replaced its compiler by the interpreter.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from lift_ds.index.encoding import CompactIndex, IndexLayout, encode
from lift_ds.index.kernels.triton_access import TritonAccess, copy_entries

#: Ampere, Hopper, Blackwell; AMD's MI300.
TARGETS = {f"sm_{number}": GPUTarget("cuda", number, 32) for number in (80, 90, 100)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)

#: Of the piece and of the values: any two that a model may have, and float64 by itself.
_MIXED = (torch.bfloat16, torch.float16, torch.float32)
DTYPES = [*itertools.product(_MIXED, _MIXED), (torch.float64, torch.float64)]
BLOCK_SHAPES = ((1, 1), (4, 4), (3, 5))
#: Columns of the grid of blocks in an index of 16-bit columns, and in one of wide positions.
GRIDS = (8, 70_000)


#: Comes with triton.
CUOBJDUMP = triton.knobs.nvidia.cuobjdump.path


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
    """What one specialisation takes of a GPU; the message where it does not compile."""
    launch = entries.launch(torch.empty(size, dtype=piece), 0, torch.empty(count, dtype=values), gather=gather)
    try:
        kernel = copy_entries.warmup(*launch.arguments, grid=(launch.programs,), **launch.constants)
    except triton.CompilationError as error:
        return str(error)
    return taken_on_cuda(kernel.asm["cubin"]) if "cubin" in kernel.asm else taken_on_amd(kernel.asm["amdgcn"])


def taken_on_cuda(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, bytes of a thread that do not fit into them, bytes of shared memory, by NVIDIA's tool."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(re.search(rf"\b{name}:(\d+)", said)[1]) for name in ("REG", "STACK", "LOCAL", "SHARED")}  # type: ignore[index]
    return {"registers": found["REG"], "spilled": found["STACK"] + found["LOCAL"], "shared": found["SHARED"]}


def taken_on_amd(assembly: str) -> dict[str, int]:
    """The same, by what the compiler notes at the end of its assembly."""
    names = (
        "vgpr_count",
        "vgpr_spill_count",
        "sgpr_spill_count",
        "private_segment_fixed_size",
        "group_segment_fixed_size",
    )
    found = {name: int(re.search(rf"\.{name}: +(\d+)", assembly)[1]) for name in names}  # type: ignore[index]
    spilled = sum(found[name] for name in names[1:4])
    return {"registers": found["vgpr_count"], "spilled": spilled, "shared": found["group_segment_fixed_size"]}


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
