"""Tensors that torch.distributed.tensor shards, as FSDP makes them: nothing here can read or write their entries."""

from __future__ import annotations

import sys

from torch import Tensor

INSTEAD_OF_FSDP = (
    "use DeepSpeed (lift_ds.initialize, or the Trainer with LiftCallback), which shards weights, index and states in "
    "ZeRO-3, or one process"
)

#: For a library that shards the layers of an attached model.
FSDP_AFTER_ATTACH = (
    "FSDP was given a model that LIFT is attached to: LIFT reads and writes single entries of whole matrices, so FSDP "
    f"is not supported; {INSTEAD_OF_FSDP}"
)


def refuse_dtensors(*tensors: Tensor) -> None:
    """Refuse tensors that torch.distributed.tensor has sharded: a kernel would read memory that is not theirs.

    Raises:
        ValueError: one of them is a DTensor.
    """
    if any(is_dtensor(tensor) for tensor in tensors):
        raise ValueError(FSDP_AFTER_ATTACH)


def is_dtensor(tensor: object) -> bool:
    """Tell whether a tensor is a DTensor; they are known only where the program has imported them."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(tensor, kind)
