"""attach and detach: a plain model becomes a LIFT model and back, in place."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch import nn

from lift_ds.config import USUAL_DENSITY, LiftConfig
from lift_ds.index.encoding import MAX_NARROW, MAX_POSITIONS
from lift_ds.model.attachment import Attachment, attachment_of, erase, record, require_attachment
from lift_ds.model.first_selection import FrozenWeight, Principal, layout_of, reserved, select_first
from lift_ds.model.kinds import manage, unmanage
from lift_ds.model.parameters import PrincipalSet
from lift_ds.model.partition import logical_shape, partition_of
from lift_ds.model.targets import Target, Targets, find_targets, reserved_weights, unmanaged_summary
from lift_ds.model.weights import PrincipalWeight
from lift_ds.model.wrappers import refuse_before_attach
from lift_ds.runtime.logs import get_logger
from lift_ds.selection.blocks import divides
from lift_ds.selection.criteria import criterion_named
from lift_ds.selection.select import fallback_note

logger = get_logger()

#: Share of the weights beside embeddings and head below which a log line names what is not managed.
_ENOUGH = 0.95

#: Share of the managed entries above which a log line says how to train fewer.
_LARGE_SHARE = 0.2


def attach(model: nn.Module, config: LiftConfig, *, resume: bool = False) -> nn.Module:
    """Make a model train its principal weights and nothing else, in place.

    Each layer with a managed weight changes its class, keeps its `weight` (frozen) and gains `principal.values` θ [k]
    (trainable, float32 until DeepSpeed casts it) and `principal.index` I [k] (frozen), selected from the weights as
    they are now. A weight of another name, such as the stack `down_proj` of some experts, has them in
    `down_proj_principal`; each matrix of a stack is selected in by itself.

    Where torch.distributed has several ranks, all of them call, with the same weights: each selects in its share of the
    matrices (`first_selection`). Works under `deepspeed.zero.Init` too: then each weight is gathered to the rank that
    selects in it, and θ and I are partitioned like the weight.

    Args:
        model: any `nn.Module` with linear layers; a causal language model of transformers as a rule.
        config: the settings.
        resume: select nothing, since a checkpoint that is loaded next has the index; training before that is refused.

    Returns:
        The model.

    Raises:
        ValueError: when LIFT is attached already, nothing matches the target modules, or a weight has NaN or
            infinite entries (the message names it). The model is unchanged then.
    """
    if _ranks_to_come() and not resume:
        logger.warning(
            "lift_ds.attach comes before torch.distributed is initialised, so each of the %s ranks selects in all "
            "matrices; call it after TrainingArguments(...) or deepspeed.init_distributed() to deal them out",
            os.environ["WORLD_SIZE"],
        )  # fmt: skip
    return _attach(model, config, select=not resume, dry=False)


def dry_attach(model: nn.Module, config: LiftConfig) -> nn.Module:
    """Attach to a model on the meta device: every layer, shape and size as `attach` makes them, and no selection.

    For planning, and for checking a model's layout without its weights; nothing can be trained afterwards.

    Args:
        model: every parameter on the meta device.
        config: the settings.

    Returns:
        The model.

    Raises:
        ValueError: as `attach`, and when a weight is not on the meta device.
    """
    return _attach(model, config, select=False, dry=True)


def _attach(model: nn.Module, config: LiftConfig, *, select: bool, dry: bool) -> nn.Module:
    if attachment_of(model) is not None:
        raise ValueError(f"LIFT is attached to this {type(model).__name__} already; call lift_ds.detach(model) first")
    refuse_before_attach(model)
    targets = find_targets(model, config)
    for target in targets.weights.values():
        _check_weight(target, config, dry=dry)
    covered = _covered(model, targets)
    left_out = unmanaged_summary(model, targets) if config.target_modules is None and covered < _ENOUGH else []

    layouts = {name: layout_of(target.sizes, config) for name, target in targets.weights.items()}
    frozen = {name: FrozenWeight(target.weight, layouts[name]) for name, target in targets.weights.items()}
    if select:
        found, subspaces, fell_back = select_first(frozen, config)
    else:
        found, subspaces, fell_back = {name: reserved(weight) for name, weight in frozen.items()}, {}, 0
    required_grad = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in targets.dense)
    everything = sum(logical_shape(parameter).numel() for parameter in model.parameters())
    weights = _manage_all(targets.weights, found)
    dense = {name: parameter for name, parameter in model.named_parameters() if name in targets.dense}
    attachment = Attachment(config, weights, required_grad, subspaces=subspaces, selected=select or dry, dense=dense)
    record(model, attachment)
    _log_attachment(attachment, covered, everything, len(targets.dense), fell_back)
    _log_targets(targets, left_out)
    return model


def _ranks_to_come() -> bool:
    """Tell whether a launcher has started several ranks that have not met yet."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not (dist.is_available() and dist.is_initialized())


def detach(model: nn.Module) -> nn.Module:
    """Make a LIFT model a plain model again, in place: original classes, parameters and `requires_grad`.

    The weights hold the trained values already. Under ZeRO-3 they stay partitioned; no collective runs.

    Args:
        model: a model that `attach` returned.

    Returns:
        The model.

    Raises:
        ValueError: when LIFT is not attached.
    """
    attachment = require_attachment(model)
    attachment.require_trained()
    if attachment.driver is not None:
        attachment.driver.changes.forget()
    erase(model)
    for module in dict.fromkeys(weight.module for weight in attachment.weights.values()):
        unmanage(module)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in attachment.required_grad)
    return model


def _check_weight(target: Target, config: LiftConfig, *, dry: bool) -> None:
    name, weight, (matrices, rows, columns) = target.full_name, target.weight, target.sizes
    one = f"{name} [{rows}, {columns}]" if matrices == 1 else f"each matrix of {name} [{matrices}, {rows}, {columns}]"
    if not divides(config.block_shape, (rows, columns)):
        raise ValueError(
            f"block_shape={config.block_shape}: {one} does not consist of whole blocks; "
            "name other target_modules, or leave block_shape out to select single entries"
        )
    entries = rows * columns * (matrices if columns // config.block_shape[1] > MAX_NARROW else 1)
    if entries > MAX_POSITIONS:
        raise ValueError(f"{name} has {entries:,} entries; LIFT manages up to {MAX_POSITIONS:,} a matrix")
    if weight.is_meta and not dry:
        raise ValueError(f"{name} is on the meta device; load the weights before lift_ds.attach")
    if dry and not weight.is_meta:
        raise ValueError(f"{name} is on {weight.device}; lift_ds.attach selects in weights that are there")
    if not weight.is_contiguous():
        raise ValueError(f"{name} is not contiguous; LIFT writes into it by flat position, so store it contiguously")


def _manage_all(targets: Mapping[str, Target], found: dict[str, Principal]) -> dict[str, PrincipalWeight]:
    """Give the modules the classes that manage their weights, and θ and I."""
    weights: dict[str, PrincipalWeight] = {}
    of_modules: dict[nn.Module, list[PrincipalWeight]] = {}
    for name, target in targets.items():
        weights[name] = PrincipalWeight(name, target.module, target.parameter)
        of_modules.setdefault(target.module, []).append(weights[name])
    for module, own in of_modules.items():
        manage(module, own)
        for weight in own:
            start = found.pop(weight.name)
            principal = PrincipalSet(start.values, start.words, start.layout)
            module.add_module(weight.principal_name, principal)
            partition_of(weight.weight).partition_like(weight.weight, [principal.values, principal.index.words])
    return weights


def _covered(model: nn.Module, targets: Targets) -> float:
    """Return what share of the weights beside embeddings and head is in the managed matrices.

    What the user has frozen does not count, where it stays so.
    """
    ends, managed = reserved_weights(model), {id(target.weight) for target in targets.weights.values()}
    beside = sum(
        logical_shape(p).numel()
        for p in model.parameters()
        if id(p) in managed or (p.requires_grad and id(p) not in ends)
    )
    return sum(math.prod(target.sizes) for target in targets.weights.values()) / beside


def _log_attachment(attachment: Attachment, covered: float, everything: int, dense: int, fell_back: int) -> None:
    config, shapes = attachment.config, [matrix.weight.shape() for matrix in attachment.matrices.values()]
    total, entries = sum(shape.numel() for shape in shapes), attachment.entries()
    budget = f"budget_rank {config.budget_rank}" if config.budget_rank is not None else f"density {config.density:g}"
    chosen = f"lra_rank {config.lra_rank}" if config.criterion == "principal" else f"criterion {config.criterion}"
    logger.info(
        "LIFT manages %d matrices, %s of %s entries (%.2f%%); %s, %s, refresh every %d steps; "
        "%.2f%% of all %s parameters; the matrices are %.2f%% of what is no embedding or head%s%s",
        len(shapes), f"{entries:,}", f"{total:,}", 100 * entries / total, budget, chosen,
        config.refresh_interval, 100 * entries / everything, f"{everything:,}", 100 * covered,
        f"; {dense} more parameters trained densely" if dense else "", fallback_note(fell_back),
    )  # fmt: skip
    if config.budget_rank is not None and entries > _LARGE_SHARE * total:
        logger.warning(
            "budget_rank %d trains %.1f%% of these matrices, since they are small; the paper trains about 5%%, "
            "which is density %g (or budget_rank %d)",
            config.budget_rank, 100 * entries / total, USUAL_DENSITY,
            max(1, round(USUAL_DENSITY * total / sum(sum(shape) for shape in shapes))),
        )  # fmt: skip
    whole = sum(config.lra_rank >= min(shape) for shape in shapes)
    if whole and criterion_named(config.criterion).low_rank:
        logger.info("lra_rank %d is not below the smaller side of %d of them: there W' = W", config.lra_rank, whole)


def _log_targets(targets: Targets, left_out: list[str]) -> None:
    """Say which layers were left out, trained densely, or managed although they had been frozen."""
    if targets.new_heads:
        logger.info("the new head %s is trained densely", ", ".join(targets.new_heads))
    if targets.left_frozen:
        logger.warning(
            "%s had been frozen (requires_grad is False) and stay so; name them in target_modules to train them",
            _counted(targets.left_frozen),
        )
    if targets.thawed:
        logger.warning(
            "%s had been frozen (requires_grad is False) and are managed, since target_modules names them",
            _counted(targets.thawed),
        )
    if left_out:
        logger.warning("not managed by LIFT, left frozen: %s", "; ".join(left_out))


def _counted(layers: Sequence[str]) -> str:
    return f"{len(layers)} layers ({layers[0]}{', ...' if len(layers) > 1 else ''})"
