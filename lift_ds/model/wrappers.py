"""Models that another library has changed, so that LIFT would train nothing or the wrong entries: refused by name.

A library is looked for only where the program has imported it.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from lift_ds.index.dtensors import FSDP_AFTER_ATTACH, INSTEAD_OF_FSDP, is_dtensor


def refuse_before_attach(model: nn.Module) -> None:
    """Refuse to attach to a model that PEFT or FSDP has changed.

    Raises:
        ValueError: names the library, and what to do instead.
    """
    if _has_adapters(model):
        raise ValueError(
            "lift_ds.attach was given a model with adapters of PEFT, and would select entries of their factors; attach "
            "to the plain model, or merge the adapters before (model.merge_and_unload())"
        )
    if _is_sharded_by_fsdp(model):
        raise ValueError(
            "lift_ds.attach was given a model that FSDP has sharded: LIFT selects entries of whole matrices; call "
            f"neither fully_shard nor FullyShardedDataParallel, and {INSTEAD_OF_FSDP}"
        )


def refuse_after_attach(model: nn.Module) -> None:
    """Refuse to train a model that PEFT or FSDP has changed since LIFT was attached.

    Raises:
        ValueError: names the library, and what to do instead.
    """
    if _has_adapters(model):
        raise ValueError(
            "adapters of PEFT were put on a model that LIFT is attached to (get_peft_model after lift_ds.attach): PEFT "
            "freezes the principal values, and nothing that LIFT says would be true. Use one of the two; a model that "
            "was LIFT-tuned takes adapters after lift_ds.detach(model)"
        )
    if _is_sharded_by_fsdp(model):
        raise ValueError(FSDP_AFTER_ATTACH)


def _has_adapters(model: nn.Module) -> bool:
    return any(_is_one_of(module, "peft.tuners.tuners_utils", "BaseTunerLayer") for module in model.modules())


def _is_sharded_by_fsdp(model: nn.Module) -> bool:
    if any(_is_one_of(module, "torch.distributed.fsdp", "FullyShardedDataParallel") for module in model.modules()):
        return True
    return any(is_dtensor(parameter) for parameter in model.parameters())


def _is_one_of(thing: Any, module: str, name: str) -> bool:
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(thing, kind)
