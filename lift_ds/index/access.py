"""Reading and writing the principal entries of a matrix, or of a contiguous piece of it, by the index as it is stored.

    gather    out[j] = piece[I[j] - start]       the gradient of θ from dW, or from a tile of its rows
    put       piece[I[j] - start] = values[j]    the write-back into W, or into a rank's shard of it
              for the j with start <= I[j] < start + len(piece); the others are left alone

Three forms of one thing: `TorchAccess` decodes the index to positions; it is the reference, and runs everywhere.
`TritonAccess` and `HostAccess` read the stored words and make no positions at all; they are what runs on CUDA where
triton is installed, and on the CPU where the host kernel was compiled.
"""

from __future__ import annotations

import functools
from typing import Protocol

from torch import Tensor

from lift_ds.index.encoding import CompactIndex
from lift_ds.index.kernels.torch_access import TorchAccess
from lift_ds.runtime.logs import get_logger


class Access(Protocol):
    """Access to the principal entries of one matrix [m, n]."""

    def gather(self, piece: Tensor, start: int, out: Tensor) -> None:
        """Copy the principal entries of a piece of the matrix to their places among all k.

        Args:
            piece: contiguous, 1-D: the flat positions from `start` on, on the device of the index.
            start: flat position of its first element.
            out: [k], any floating dtype; entries outside the piece stay as they are.
        """

    def put(self, piece: Tensor, start: int, values: Tensor) -> None:
        """Write values over the principal entries of a piece of the matrix, in its dtype.

        Args:
            piece: as in `gather`.
            start: as in `gather`.
            values: [k], contiguous, any floating dtype; those outside the piece are not read.
        """


def access_to(index: CompactIndex) -> Access:
    """Return the form of access for the device of an index; this is the only place that chooses.

    Args:
        index: whole.
    """
    if index.words.is_cuda and _has_triton():
        from lift_ds.index.kernels.triton_access import TritonAccess

        return TritonAccess(index)
    if index.words.device.type == "cpu" and _has_host_kernel():
        from lift_ds.index.kernels.host_access import HostAccess

        return HostAccess(index)
    return TorchAccess(index)


@functools.cache
def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        get_logger().warning("triton is not installed: gradients are gathered and weights written by torch's operators")
        return False
    return True


@functools.cache
def _has_host_kernel() -> bool:
    try:
        import lift_ds.index.kernels._host  # noqa: F401
    except ImportError as error:
        get_logger().warning(
            f"the host kernel was not compiled when lift_ds was installed ({error}): on the CPU, gradients are "
            "gathered and weights written by torch's operators"
        )
        return False
    return True
