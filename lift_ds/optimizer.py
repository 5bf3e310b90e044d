"""LiftAdamW: AdamW over the principal values."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lift_ds.model.attachment import Attachment, require_attachment
from lift_ds.model.partition import logical_shape
from lift_ds.model.weights import VALUES
from lift_ds.refresh.carry import EXP_AVG
from lift_ds.refresh.driver import Driver
from lift_ds.refresh.store import DenseStore


class LiftAdamW(torch.optim.AdamW):
    """AdamW over the principal values of a model, by torch's fused kernel or, offloaded, DeepSpeedCPUAdam's.

    Built from a model it is complete in plain PyTorch: `step()` updates θ, writes it into the weights and refreshes
    the selection when it is due. Handed to `lift_ds.initialize` or to a Trainer with `LiftCallback`, DeepSpeed keeps
    θ's master values and moments in its partitions, and those two do the rest after each step of the engine.

    Args:
        params: a model with LIFT attached, or parameters or groups as for any torch optimizer (the Trainer's
            `optimizer_cls_and_kwargs` gives groups).
        lr: learning rate.
        betas: decay rates of the moments.
        eps: term added to the denominator.
        weight_decay: decoupled decay of the principal values themselves (`θ -= lr * weight_decay * θ`). Of the
            parameters trained densely beside, matrices decay too, vectors (norms, biases) do not.

    Raises:
        ValueError: when the model has no LIFT attached, another library has changed it since, or a setting is out of
            range.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        attachment = None
        if isinstance(params, nn.Module):
            attachment = require_attachment(params)
            attachment.require_trainable(params)
        groups = _parameter_groups(params, weight_decay) if isinstance(params, nn.Module) else params
        super().__init__(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self._kernel: Any = None
        self.driver: Driver | None = None
        self._hook: RemovableHandle | None = None
        if attachment is not None:
            attachment.optimizer = self
            self.driver, self._hook = drive_plain(self, attachment)

    def yield_to(self, driver: Driver) -> None:
        """Leave write-back and refresh to a driver that runs after the steps of the engine."""
        if self._hook is not None:
            self._hook.remove()
        self.driver = driver

    def step_with(self, kernel: torch.optim.Optimizer) -> None:
        """Step with another Adam from now on: DeepSpeedCPUAdam, for master values that are offloaded to the host.

        Groups and state stay here, so that checkpoints do not depend on the choice.

        Args:
            kernel: an Adam whose step reads `param_groups` and `state`; its own are not used.
        """
        self._kernel = kernel
        # On the instance: torch wraps `step` per class to run its hooks, and an override in this class that calls the
        # parent's would run them twice.
        self.step = self._step_with_kernel  # type: ignore[method-assign]

    @torch.no_grad()
    def _step_with_kernel(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the kernel; under DeepSpeed one call covers one group or sub-group of partitions."""
        self._kernel.param_groups = [{**group, "bias_correction": True} for group in self.param_groups]
        self._kernel.state = self.state
        for moments in self.state.values():
            if "step" in moments:
                moments["step"] = int(moments["step"])  # torch's kernels count in a tensor, this one in a number
        return self._kernel.step(closure)


def drive_plain(optimizer: torch.optim.Optimizer, attachment: Attachment) -> tuple[Driver, RemovableHandle]:
    """Let a torch optimizer that holds the principal values itself write back and refresh after each step.

    Args:
        optimizer: any Adam of torch.
        attachment: the managed weights.

    Returns:
        The driver, and the handle that removes it.
    """
    driver = Driver(attachment, DenseStore(optimizer), optimizer)
    trained = {id(weight.principal_values) for weight in attachment.weights.values()}

    def before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for weight in attachment.weights.values():
            values = weight.principal_values
            moments = optimizer.state.get(values)
            if moments and moments[EXP_AVG].dtype != values.dtype:
                raise RuntimeError(
                    f"the model was cast to {values.dtype} after its first step, while the optimizer's moments are "
                    f"{moments[EXP_AVG].dtype}; cast it before lift_ds.attach"
                )
        if attachment.driver is driver:  # under DeepSpeed another one
            driver.step_begins()

    def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # torch's GradScaler lets a fused kernel skip by itself
        if found_inf is not None and found_inf.item():
            return
        if any(id(p) in trained for group in optimizer.param_groups for p in group["params"]):
            driver.step_applied()
        elif attachment.reached:  # before the first gradient it is DeepSpeed that sets up its states
            raise RuntimeError(
                "LIFT is attached but not active: DeepSpeed drives this optimizer over its own partitions and nobody "
                "writes them back. Build the engine with lift_ds.initialize(...), or add lift_ds.LiftCallback()"
            )

    optimizer.register_step_pre_hook(before_step)
    return driver, optimizer.register_step_post_hook(after_step)


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Principal values and dense matrices decay, dense vectors do not; groups of nothing are left out."""
    decayed: list[Tensor] = []
    undecayed: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_value = name.endswith(VALUES)
            dimensions = len(logical_shape(parameter))
            (decayed if is_value or dimensions > 1 else undecayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
