"""Which layers of a model LIFT manages, and which parameters it trains densely beside."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

from lift_ds.config import TARGET_PRESETS
from lift_ds.layers import MANAGED_CLASSES, logical_shape


def matches(name: str, pattern: str) -> bool:
    """Tell whether the last components of a dotted name are those of the pattern."""
    return name == pattern or name.endswith("." + pattern)


def find_targets(model: nn.Module, target_modules: str | tuple[str, ...] | None) -> dict[str, nn.Module]:
    """Find the layers to manage.

    Args:
        model: any module; a weight partitioned by ZeRO-3 is judged by its logical shape.
        target_modules: as in LiftConfig.

    Returns:
        Dotted name -> layer, in the order of the model's modules; never the output head, an embedding or a
        layer that shares its weight with one of them.

    Raises:
        ValueError: when nothing can be managed, a name matches no such layer, or a layer shares its weight with
            another module.
    """
    reserved = _reserved_weights(model)
    linear = {name: module for name, module in model.named_modules() if type(module) in MANAGED_CLASSES}
    candidates = {name: module for name, module in linear.items() if id(module.weight) not in reserved}
    if not candidates:
        kinds = " or ".join(kind.__name__ for kind in MANAGED_CLASSES)
        raise ValueError(
            f"{type(model).__name__} has no layer LIFT can manage; it manages {kind_list(model)}{kinds} layers "
            "other than the output head"
        )
    if target_modules is None:
        chosen = candidates
    else:
        patterns = TARGET_PRESETS[target_modules] if isinstance(target_modules, str) else target_modules
        chosen = {name: m for name, m in candidates.items() if any(matches(name, pattern) for pattern in patterns)}
        unmatched = [p for p in patterns if not any(matches(name, p) for name in chosen)]
        if unmatched and (not isinstance(target_modules, str) or not chosen):
            _refuse_unmatched(model, target_modules, unmatched, candidates, linear)
    _refuse_shared(model, chosen)
    return chosen


def kind_list(model: nn.Module) -> str:
    """Return a hint on linear layers of kinds that are not managed (quantised, adapters), or nothing."""
    others = sorted(
        {type(m).__name__ for m in model.modules() if isinstance(m, nn.Linear) and type(m) not in MANAGED_CLASSES}
    )
    return f"(not {', '.join(others)}) " if others else ""


def find_extra_parameters(model: nn.Module, names: Iterable[str], managed: dict[str, nn.Module]) -> set[str]:
    """Find the parameters trained densely beside the principal values.

    Args:
        model: the model.
        names: as `extra_trainable` in LiftConfig.
        managed: the layers found by `find_targets`.

    Returns:
        Full names of the parameters.

    Raises:
        ValueError: when a name matches nothing, or matches a managed weight.
    """
    parameters = dict(model.named_parameters())
    managed_weights = {f"{name}.weight" for name in managed}
    found: set[str] = set()
    for pattern in names:
        hits = {name for name in parameters if matches(name, pattern)}
        if not hits:
            endings = sorted({".".join(name.split(".")[-2:]) for name in parameters})
            raise ValueError(f"extra_trainable name {pattern!r} matches no parameter{_suggest(pattern, endings)}")
        if hits & managed_weights:
            raise ValueError(
                f"extra_trainable name {pattern!r} matches {min(hits & managed_weights)}, which LIFT manages already; "
                "a weight is trained either sparsely or densely"
            )
        found |= hits
    return found


def unmanaged_summary(model: nn.Module, managed: dict[str, nn.Module], extra: set[str]) -> list[str]:
    """List the matrices and stacks of matrices that stay frozen although they are neither embedding nor head.

    Args:
        model: the model.
        managed: the layers found by `find_targets`.
        extra: the names found by `find_extra_parameters`.

    Returns:
        One entry per kind, as "model.layers.*.mlp.experts.down_proj [8, 64, 128] x 2".
    """
    reserved = _reserved_weights(model)
    managed_weights = {id(module.weight) for module in managed.values()}
    kinds: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        shape = logical_shape(parameter)
        if len(shape) < 2 or name in extra or id(parameter) in reserved | managed_weights:
            continue
        kinds[f"{re.sub(r'[.][0-9]+[.]', '.*.', name)} {list(shape)}"] += 1
    return [f"{kind} x {count}" for kind, count in kinds.items()]


def _reserved_weights(model: nn.Module) -> set[int]:
    """Identities of the weights of embeddings and of the output head, and of what is tied to them."""
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    modules = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    modules += [m for name, m in model.named_modules() if m is head or matches(name, "lm_head")]
    return {id(m.weight) for m in modules if getattr(m, "weight", None) is not None}


def _refuse_unmatched(
    model: nn.Module,
    target_modules: str | tuple[str, ...],
    unmatched: list[str],
    candidates: dict[str, nn.Module],
    linear: dict[str, nn.Module],
) -> None:
    for pattern in unmatched:
        for name in linear:
            if matches(name, pattern):
                raise ValueError(
                    f"target_modules: {name} is the output head or shares its weight with an embedding; LIFT does not "
                    "manage it"
                )
        for name, parameter in model.named_parameters():
            if matches(name, pattern) and len(logical_shape(parameter)) > 2:
                raise ValueError(
                    f"target_modules: {name} is a stack of matrices {list(logical_shape(parameter))}, not a linear "
                    "layer; LIFT manages matrices that are layers of their own"
                )
    names = sorted({name.rsplit(".", 1)[-1] for name in candidates})
    raise ValueError(
        f"target_modules={target_modules!r}: no linear layer of {type(model).__name__} is named "
        f"{' or '.join(map(repr, unmatched))}{_suggest(unmatched[0], names)}"
    )


def _suggest(pattern: str, names: list[str]) -> str:
    nearest = difflib.get_close_matches(pattern, names, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"{hint}; there are {', '.join(names)}"


def _refuse_shared(model: nn.Module, chosen: dict[str, nn.Module]) -> None:
    managed = {id(module.weight): name for name, module in chosen.items()}
    for other, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            name = managed.get(id(parameter), other)
            if name != other:
                raise ValueError(
                    f"target_modules: {other} and {name} share one weight; LIFT trains a weight in one layer only, so "
                    "leave both out"
                )
