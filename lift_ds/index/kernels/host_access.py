"""Principal entries on the host, by a kernel in C that reads the stored index: row counts, 16-bit columns, blocks.

It is compiled when the package is installed (setup.py), where there is a C compiler. It uses OpenMP; torch is imported
first, so that the threads are those of torch: the loader knows the OpenMP library that torch brings by its name.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from lift_ds.index.dtensors import refuse_dtensors
from lift_ds.index.encoding import CompactIndex
from lift_ds.index.kernels._host import copy_entries
from lift_ds.index.kernels.torch_access import TorchAccess

#: (of the piece, of the values) -> number of the loop in host_access.c; other pairs are left to torch.
_KINDS = {
    (torch.bfloat16, torch.bfloat16): 0,
    (torch.float16, torch.float16): 0,
    (torch.float32, torch.float32): 1,
    (torch.float64, torch.float64): 2,
    (torch.bfloat16, torch.float32): 3,
    (torch.float32, torch.bfloat16): 4,
}


class HostAccess:
    """Access to the principal entries of one matrix in the host's memory; see `lift_ds.index.access.Access`.

    Args:
        index: whole.

    Raises:
        ValueError: by its methods, before anything is copied, when the sizes of index, piece and values contradict each
            other.
    """

    def __init__(self, index: CompactIndex) -> None:
        self._index = index

    @cached_property
    def _by_torch(self) -> TorchAccess:
        return TorchAccess(self._index)

    def gather(self, piece: Tensor, start: int, out: Tensor) -> None:
        """See `lift_ds.index.access.Access.gather`."""
        kind = _KINDS.get((piece.dtype, out.dtype))
        if kind is None:
            self._by_torch.gather(piece, start, out)
        else:
            self._copy(kind, piece, start, out, gather=True)

    def put(self, piece: Tensor, start: int, values: Tensor) -> None:
        """See `lift_ds.index.access.Access.put`."""
        kind = _KINDS.get((piece.dtype, values.dtype))
        if kind is None:
            self._by_torch.put(piece, start, values)
        else:
            self._copy(kind, piece, start, values, gather=False)

    def _copy(self, kind: int, piece: Tensor, start: int, values: Tensor, *, gather: bool) -> None:
        words, layout = self._index.words, self._index.layout
        refuse_dtensors(words, piece, values)
        assert words.dtype == torch.int32, "the words of an index are int32"
        for tensor in (words, piece, values):
            assert tensor.device.type == "cpu", f"the kernel of the host cannot reach {tensor.device}"
            assert tensor.is_contiguous(), "addresses are those of contiguous tensors"
        copy_entries(
            kind, gather, words.data_ptr(), words.numel(), layout.blocks, *layout.grid, *layout.block_shape,
            layout.wide, piece.data_ptr(), start, start + piece.numel(), values.data_ptr(), values.numel(),
            torch.get_num_threads(),
        )  # fmt: skip
