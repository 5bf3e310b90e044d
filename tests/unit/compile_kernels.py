"""Compiles the Triton kernel for GPUs that need not be there, by the functions that launch it.

python compile_kernels.py FOLDER TARGET...     FOLDER/TARGET.json: {form: what the kernel takes of a GPU, or an error}

Gathers and puts run as in training, down to the launch itself, which is left out. Beside each form that is compiled
stands how many more were compiled for tensors that begin at an odd element: none, or a training would compile again
whenever the alignment of a piece changes.

A program of its own: where TRITON_INTERPRET is set, triton has replaced its compiler by the interpreter. One process
for each GPU, forked once triton is imported.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from lift_ds.index.encoding import CompactIndex, IndexLayout, encode
from lift_ds.index.kernels.triton_access import TritonAccess, copy_entries

#: Ampere, Hopper, Blackwell; AMD's MI300.
TARGETS = {f"sm_{number}": GPUTarget("cuda", number, 32) for number in (80, 90, 100)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)

_HALVES, _SINGLE, _DOUBLE = (torch.bfloat16, torch.float16), torch.float32, torch.float64
#: Of a tile of the gradient and of the values: any two, since autocast and casts of the model choose them apart.
GATHERED = [*itertools.product((*_HALVES, _SINGLE, _DOUBLE), repeat=2)]
#: Of the weight and of the values: any two that a model may have, and float64 by itself.
PUT = [*itertools.product((*_HALVES, _SINGLE), repeat=2), (_DOUBLE, _DOUBLE)]
#: As DeepSpeed trains, and as plain PyTorch does.
COMMON = [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, _SINGLE)]
BLOCK_SHAPES = ((1, 1), (4, 4), (3, 5))
#: Shapes for which the common dtypes have to do: their code is that of the others, without some divisions.
FLAT_BLOCKS = ((1, 4), (8, 1))
#: Columns of the grid of blocks in an index of 16-bit columns, and in one of wide positions.
GRIDS = (8, 70_000)
#: Bytes of a storage from which addresses in it need more than 32 bits; AMD's compiler asks for that.
LARGE = 2**31

#: Comes with triton.
CUOBJDUMP = triton.knobs.nvidia.cuobjdump.path


class CompileOnly:
    """What triton asks of a driver: a device that is compiled for, and on which a launch does nothing."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target
        self.utils = self
        self.launched = 0

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 2**16}

    def load_binary(self, *arguments: Any) -> tuple[None, None, int, int, int]:
        """Module, function, registers, spills (not looked at: the tools below read them), threads of a program."""
        return None, None, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return self._launch

    def _launch(self, *arguments: Any) -> None:
        self.launched += 1


@dataclass(frozen=True)
class Form:
    """What the kernel is compiled for.

    Args:
        block_shape: (p, q).
        grid_columns: of blocks.
        piece: dtype of the weight, or of the tile of its gradient.
        values: dtype of θ, or of its gradient.
        gather: from piece to values; else from values to piece.
        large: which of the two are parts of storages of 2 GiB and more: "", "piece", "values", "both".
    """

    block_shape: tuple[int, int]
    grid_columns: int
    piece: torch.dtype
    values: torch.dtype
    gather: bool
    large: str = ""

    def __str__(self) -> str:
        way = "gather" if self.gather else "put"
        return f"{self.block_shape} {self.grid_columns} {self.piece} {self.values} {way} {self.large}".rstrip()

    def copy(self, *, offset: int) -> None:
        """Gather, or put, the entries of one block in a matrix of two rows of blocks.

        Args:
            offset: elements of the storage before the piece and before the values.
        """
        (p, q), columns = self.block_shape, self.grid_columns * self.block_shape[1]
        positions = (torch.arange(p)[:, None] * columns + torch.arange(q)).flatten()
        layout = IndexLayout(2 * p, columns, positions.numel(), self.block_shape)
        words = encode(positions, 2 * p, columns, self.block_shape)
        entries = TritonAccess(CompactIndex(words, layout))
        piece = _part(2 * p * columns, self.piece, offset, large=self.large in ("piece", "both"))
        values = _part(positions.numel(), self.values, offset, large=self.large in ("values", "both"))
        (entries.gather if self.gather else entries.put)(piece, 0, values)


def _part(count: int, dtype: torch.dtype, offset: int, *, large: bool) -> Tensor:
    """Some elements of a storage; of a large one there is the size alone."""
    if large:
        return torch.empty(LARGE // dtype.itemsize + offset + count, dtype=dtype, device="meta")[offset:][:count]
    return torch.empty(offset + count, dtype=dtype)[offset:]


def forms() -> Iterator[Form]:
    """Every form that training can ask for; of the shapes of blocks, which users choose, each kind."""
    for gather, dtypes in ((True, GATHERED), (False, PUT)):
        for grid_columns in GRIDS:
            for block_shape, pair in itertools.product(BLOCK_SHAPES, dtypes):
                yield Form(block_shape, grid_columns, *pair, gather)
            for block_shape, pair in itertools.product(FLAT_BLOCKS, COMMON):
                yield Form(block_shape, grid_columns, *pair, gather)
            for block_shape, large in itertools.product(BLOCK_SHAPES[:2], ("piece", "values", "both")):
                yield Form(block_shape, grid_columns, *COMMON[0], gather, large)


def compiled(form: Form, driver: CompileOnly) -> dict[str, int] | str:
    """What one form takes of a GPU, and what else was compiled; the message where it does not compile."""
    kernels, before = copy_entries.device_caches[0][0], driver.launched
    known = len(kernels)
    try:
        form.copy(offset=0)
    except triton.CompilationError as error:
        return str(error)
    assert driver.launched == before + 1, "gathers and puts end in one launch"
    aligned = len(kernels)
    form.copy(offset=1)
    if aligned == known:
        return {"compiled": 0, "unaligned": len(kernels) - aligned}
    code = list(kernels.values())[known].asm
    taken = taken_on_cuda(code["cubin"]) if "cubin" in code else taken_on_amd(code["amdgcn"])
    return {"compiled": aligned - known, "unaligned": len(kernels) - aligned, **taken}


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


def compile_for(target: str, folder: Path) -> None:
    """Compile every form for one GPU."""
    triton.knobs.cache.dir = str(folder / target)  # nothing is taken from an earlier run
    driver = CompileOnly(TARGETS[target])
    triton.runtime.driver.set_active(driver)
    (folder / f"{target}.json").write_text(json.dumps({str(form): compiled(form, driver) for form in forms()}))


def main(folder: Path, targets: Sequence[str]) -> int:
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=compile_for, args=(target, folder)) for target in targets]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return sum(process.exitcode != 0 for process in processes)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
