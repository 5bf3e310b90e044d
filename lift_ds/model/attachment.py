"""Attachment: what `attach` did to a model, and the checks that LIFT is really active."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lift_ds.config import LiftConfig
from lift_ds.index.encoding import CompactIndex
from lift_ds.model.gradients import GradientMeter
from lift_ds.model.weights import PRINCIPAL, PRINCIPAL_KEYS, PrincipalMatrix, PrincipalWeight, matrices_of
from lift_ds.model.wrappers import refuse_after_attach
from lift_ds.selection.criteria import criterion_named

_ATTRIBUTE = "_lift_attachment"


@dataclass
class Attachment:
    """The managed weights of one model, what is needed to undo the attachment, and whether it is active.

    Args:
        config: the settings it was attached with.
        weights: name -> managed weight, in the order of the model's modules.
        required_grad: names of the parameters that required grad before.
        driver: what applies the principal values after a step (set by LiftAdamW, or by `lift_ds.bind`).
        optimizer: the LiftAdamW built from the model, if one was.
        reached: weights whose principal values a gradient has reached since the last applied step.
        ever_reached: and since the beginning of this process, up to that step.
        partitioned: whether θ is away from its module between steps (ZeRO-3).
        backwards: how often a gradient reached a weight before the first applied step.
        step_seen: whether a step has been applied.
        subspaces: name of a matrix -> what "chebyshev" starts from at the next refresh, float16 on the host; each rank
            has those of the matrices it selects in.
        hooks: on the model, for as long as LIFT is attached.
        selected: whether the weights have an index; else a checkpoint is to bring it.
        gradients: measures gradients, where the criterion looks at them; None until it has batches.
        dense: name -> parameter, of those that are trained in full beside.
        shows_base: whether the weights are those before training at this moment (`lift_ds.base_weights`).
    """

    config: LiftConfig
    weights: dict[str, PrincipalWeight]
    required_grad: frozenset[str]
    driver: Any = None
    optimizer: Any = None
    reached: set[PrincipalWeight] = field(default_factory=set)
    ever_reached: set[PrincipalWeight] = field(default_factory=set)
    partitioned: bool = False
    backwards: int = 0
    step_seen: bool = False
    subspaces: dict[str, Tensor] = field(default_factory=dict)
    hooks: list[RemovableHandle] = field(default_factory=list)
    selected: bool = True
    gradients: GradientMeter | None = None
    dense: dict[str, nn.Parameter] = field(default_factory=dict)
    shows_base: bool = False

    @property
    def needs_gradients(self) -> bool:
        """Whether the criterion looks at gradients."""
        return criterion_named(self.config.criterion).gradient

    @property
    def matrices(self) -> dict[str, PrincipalMatrix]:
        """Name -> matrix, of all managed weights; those of a stack one after the other."""
        return matrices_of(self.weights)

    def note_backward(self, weight: PrincipalWeight, index: CompactIndex) -> None:
        """Note that a gradient reached the principal values of a weight, which is whole at this moment.

        Args:
            weight: it.
            index: its principal index, whole.

        Raises:
            RuntimeError: when nothing would ever write them into the weights, or something else has changed them.
        """
        self.require_trained()
        whole = weight.principal.is_whole()
        # Where θ is partitioned, a LiftAdamW built for the model cannot drive it by itself.
        if self.driver is None or not (whole or self.driver.store.sharded):
            raise RuntimeError(
                "LIFT is attached but not active: nothing applies the principal values after a step. Build the "
                "optimizer with lift_ds.LiftAdamW(model), the engine with lift_ds.initialize(...), or add "
                "lift_ds.LiftCallback() to the Trainer; lift_ds.detach(model) makes it a plain model again"
            )
        self.reached.add(weight)
        if not self.step_seen:
            self.backwards += 1
            # Comparing decodes the index and synchronises a device: at every power of two, and no more once a step has
            # been applied.
            due = whole and self.backwards & (self.backwards - 1) == 0
            if due and not weight.holds_its_values(index):
                raise RuntimeError(
                    "LIFT is attached but not active: an optimizer changed the principal values, and nothing wrote "
                    "them into the weights. Let the LiftAdamW that was built take the steps, or add "
                    "lift_ds.LiftCallback() to the Trainer; and attach after loading weights, not before"
                )

    def confirm_gradients(self) -> None:
        """Check at an applied step that gradients reached LIFT since the last one.

        Raises:
            RuntimeError: when no weight saw a gradient, so that the step trained nothing.
        """
        if not self.reached:
            raise RuntimeError(
                "LIFT is attached but not active: no gradient reached a principal value since the last step. With "
                "reentrant activation checkpointing call model.enable_input_require_grads(), since the embeddings "
                "are frozen; also check that the managed layers take part in the loss"
            )
        self.ever_reached |= self.reached
        self.reached = set()
        self.step_seen = True

    def require_trained(self) -> None:
        """Check that the weights are the trained ones.

        Raises:
            RuntimeError: they are those before training, within `lift_ds.base_weights`.
        """
        if self.shows_base:
            raise RuntimeError(
                "within lift_ds.base_weights the weights are those before training: run the model under "
                "torch.no_grad() there; train, save, load and detach it after the context"
            )

    def require_selected(self) -> None:
        """Check that there is a selection to train or save.

        Raises:
            RuntimeError: `attach` has left it to a checkpoint, and none has been loaded; or as `require_trained`.
        """
        self.require_trained()
        if not self.selected:
            raise RuntimeError(
                "nothing is selected: resume=True left the index to a checkpoint, and none has been loaded since; load "
                "one before training, or leave resume=True out to begin anew"
            )
        if self.needs_gradients and self.gradients is None:
            raise RuntimeError(
                f"criterion={self.config.criterion!r} selects by gradients, and there are no batches to measure them "
                "on: call lift_ds.select_by_gradients(model, batches) before the first step"
            )

    def require_trainable(self, model: nn.Module) -> None:
        """Check that LIFT's parameters are as `attach` left them.

        Args:
            model: the model LIFT is attached to, or a wrapper of it.

        Raises:
            ValueError: when another library has changed the model, or what is frozen and what is trained.
        """
        refuse_after_attach(model)
        present = set(model.modules())
        gone = [name for name, weight in self.weights.items() if weight.module not in present]
        if gone:
            raise ValueError(
                f"{gone[0]}, which LIFT manages, is no part of the {type(model).__name__} any more ({len(gone)} such "
                "layers): something has replaced layers since lift_ds.attach; let it do so before"
            )
        frozen = [name for name, weight in self.weights.items() if not weight.principal_values.requires_grad]
        if frozen:
            raise ValueError(
                f"the principal values of {frozen[0]} do not require gradients any more ({len(frozen)} such layers); "
                "freeze layers before lift_ds.attach, which then leaves them alone, or name them in exclude_modules"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        """A copy of the model is not trained until an optimizer is built for it."""
        copied = Attachment(self.config, {}, self.required_grad, subspaces=dict(self.subspaces), selected=self.selected)
        memo[id(self)] = copied
        copied.weights = copy.deepcopy(self.weights, memo)
        copied.dense = copy.deepcopy(self.dense, memo)
        return copied

    def entries(self) -> int:
        """Return how many entries are trained in all managed matrices together."""
        return sum(weight.entries() for weight in self.weights.values())


def attachment_of(model: nn.Module) -> Attachment | None:
    """Return the attachment of a model, also through wrappers that hold it as a submodule; None without one."""
    for module in model.modules():
        attachment = module.__dict__.get(_ATTRIBUTE)
        if attachment is not None:
            return attachment
    return None


def require_attachment(model: nn.Module) -> Attachment:
    """Return the attachment of a model.

    Raises:
        ValueError: when LIFT is not attached to it.
    """
    attachment = attachment_of(model)
    if attachment is None:
        raise ValueError(
            f"LIFT is not attached to this {type(model).__name__}; call lift_ds.attach(model, config) first"
        )
    return attachment


def leave_out_of_saved_models(model: nn.Module) -> None:
    """Let `save_pretrained` write the plain model: the weights hold the trained values, θ and I stay in checkpoints.

    Without DeepSpeed the Trainer resumes from the saved model, which then has to have them.

    Args:
        model: the model LIFT is attached to, or a wrapper of it.
    """
    for module in model.modules():
        if _ATTRIBUTE in module.__dict__ and hasattr(module, "_keys_to_ignore_on_save"):
            holder: Any = module
            holder._keys_to_ignore_on_save = set(holder._keys_to_ignore_on_save or ()) | _principal_keys(holder)


def _principal_keys(module: nn.Module) -> set[str]:
    return {key for weight in module.__dict__[_ATTRIBUTE].weights.values() for key in principal_keys(weight)}


def principal_keys(weight: PrincipalWeight) -> tuple[str, ...]:
    """Return the names of θ and of the words of I of a weight, in the state dict of the model."""
    before = weight.full_name.removesuffix(weight.parameter) + weight.principal_name.removesuffix(PRINCIPAL)
    return tuple(f"{before}{key}" for key in PRINCIPAL_KEYS)


def record(model: nn.Module, attachment: Attachment) -> None:
    """Store an attachment with its model; its weights refer to it too."""
    model.__dict__[_ATTRIBUTE] = attachment
    for weight in attachment.weights.values():
        weight.owner = attachment


def erase(model: nn.Module) -> None:
    """Forget the attachment of a model."""
    for module in model.modules():
        attachment = module.__dict__.get(_ATTRIBUTE)
        if attachment is not None:
            for handle in attachment.hooks:
                handle.remove()
            holder: Any = module
            if getattr(holder, "_keys_to_ignore_on_save", None):
                holder._keys_to_ignore_on_save = set(holder._keys_to_ignore_on_save) - _principal_keys(holder)
            del module.__dict__[_ATTRIBUTE]
            return
