"""ReferenceModel: the model before training as the reference of DPO, KTO, GRPO or RLOO, without a second copy of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lift_ds.model.attachment import require_attachment
from lift_ds.refresh.changes import base_weights, require_base


class ReferenceModel(nn.Module):
    """The model before training: calling it calls the model that is trained, within `lift_ds.base_weights`.

    It runs in evaluation mode and under `torch.no_grad()`, and holds no weights. TRL's trainers that take a
    reference take it as `ref_model`. GRPO and RLOO make one by themselves unless `beta` is 0: build such a trainer with
    `beta=0.0`, and set `trainer.beta` and `trainer.ref_model` afterwards.

    Args:
        model: the one that is trained, with LIFT attached by `keep_base=True`.

    Raises:
        ValueError: LIFT is not attached, or `keep_base` is not set.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        require_base(require_attachment(model))
        self.__dict__["trained"] = model  # no part of this module: whoever prepares it leaves the model alone
        dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
        self.nothing = nn.Parameter(torch.zeros(1, dtype=dtype), requires_grad=False)  # DeepSpeed looks for one
        self.eval()

    @property
    def config(self) -> Any:
        """That of the model."""
        return self.__dict__["trained"].config

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Not by `forward`, which TRL replaces in a reference, as it has already done in the model.
        model = self.__dict__["trained"]
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            with base_weights(model), torch.no_grad():
                return model(*args, **kwargs)
        finally:
            for module in training:
                module.training = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As calling it."""
        return self(*args, **kwargs)
