"""Which weights of a model LIFT manages, and which parameters it trains densely beside.

The rule, for `target_modules` left out: every matrix is managed (`matrices` says what is one) but

    - the output head, and whatever shares its weight with an embedding,
    - the router of a mixture of experts,
    - those that `exclude_modules` names, by themselves or by a module around them,
    - those that the user has frozen (`requires_grad` is False),
    - those of a new head (`score`, `classifier`, `qa_outputs` of the model itself), which is trained densely,
    - those that `extra_trainable` names, which are trained densely too.

A weight that `target_modules` names is managed, also where it was frozen. It goes by the name of its layer where that
calls it "weight", else by its own.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lift_ds.config import TARGET_PRESETS, LiftConfig
from lift_ds.model.matrices import Sizes, matrices_in
from lift_ds.model.partition import logical_shape

#: Heads that transformers puts on a pretrained model with new weights; PEFT trains those of the same names whole.
NEW_HEADS = ("score", "classifier", "qa_outputs")


@dataclass(frozen=True)
class Target:
    """A weight to manage.

    Args:
        module: that has it.
        parameter: what it is called there.
        full_name: its dotted name in the model.
        sizes: how many matrices it holds, their rows and columns.
    """

    module: nn.Module
    parameter: str
    full_name: str
    sizes: Sizes

    @property
    def weight(self) -> Any:
        """The parameter."""
        return self.module._parameters[self.parameter]


@dataclass(frozen=True)
class Targets:
    """What is trained in a model.

    Args:
        weights: name -> weight to manage, in the order of the model's modules.
        dense: names of the parameters that are trained densely beside.
        new_heads: names of the modules whose parameters are among these because the heads are new.
        left_frozen: names of the weights that are not managed because the user has frozen them.
        thawed: names of the weights that are managed although they were frozen, since the user has named them.
    """

    weights: dict[str, Target]
    dense: set[str]
    new_heads: tuple[str, ...]
    left_frozen: tuple[str, ...]
    thawed: tuple[str, ...]


def matches(name: str, pattern: str) -> bool:
    """Tell whether the last components of a dotted name are those of the pattern."""
    return name == pattern or name.endswith("." + pattern)


def find_targets(model: nn.Module, config: LiftConfig) -> Targets:
    """Find what is trained.

    Args:
        model: any module; a weight partitioned by ZeRO-3 is judged by its logical shape.
        config: `target_modules`, `exclude_modules` and `extra_trainable`.

    Returns:
        The weights to manage and the parameters to train densely.

    Raises:
        ValueError: when nothing can be managed, a name matches nothing, a weight is named both ways, or two modules
            share one.
    """
    excluded = _excluded(model, config.exclude_modules)
    by_name = isinstance(config.target_modules, tuple)
    matrices = dict(_matrices(model, every=by_name))
    candidates = _candidates(model, matrices)
    chosen = _named(model, config.target_modules, candidates, matrices)
    chosen = _without_excluded(config, chosen, excluded)
    heads, dense = _new_heads(model, {*excluded, *(chosen if by_name else ())})
    chosen = {name: target for name, target in chosen.items() if target.full_name not in dense}
    frozen = tuple(name for name, target in chosen.items() if not target.weight.requires_grad)
    if frozen and not by_name:
        chosen = _without_frozen(model, chosen, frozen)
    _refuse_shared(model, chosen)
    dense |= find_extra_parameters(model, config.extra_trainable, chosen)
    return Targets(chosen, dense, heads, () if by_name else frozen, frozen if by_name else ())


def _matrices(model: nn.Module, *, every: bool = False) -> Iterable[tuple[str, Target]]:
    """Yield (name, weight) of all matrices and stacks, in the order of the model's modules.

    Args:
        model: the model.
        every: whether those are wanted too that are not managed but by name: routers, and matrices of modules whose
            kind is not known.
    """
    routers = set() if every else _routers(model)
    for name, module in model.named_modules():
        for parameter, value in module.named_parameters(recurse=False):
            sizes = matrices_in(module, parameter, value, every=every)
            if sizes is not None and name not in routers:
                full_name = f"{name}.{parameter}" if name else parameter
                yield name if parameter == "weight" else full_name, Target(module, parameter, full_name, sizes)


def _routers(model: nn.Module) -> set[str]:
    """Names of the modules that route tokens to experts: each `router`, or `gate` beside `experts`, and all below."""
    gates = {f"{name}.gate".lstrip(".") for name, module in model.named_modules() if hasattr(module, "experts")}
    return {
        name
        for name, _ in model.named_modules()
        if "router" in name.split(".") or any(name == gate or name.startswith(f"{gate}.") for gate in gates)
    }


def kind_list(model: nn.Module) -> str:
    """Return a hint on linear layers whose weights are not matrices of numbers (quantised), or nothing."""
    others = sorted(
        {
            type(module).__name__
            for module in model.modules()
            if isinstance(module, nn.Linear) and matrices_in(module, "weight", module.weight) is None
        }
    )
    return f" (not {', '.join(others)})" if others else ""


def find_extra_parameters(model: nn.Module, names: Iterable[str], managed: Mapping[str, Target]) -> set[str]:
    """Find the parameters trained densely beside the principal values.

    Args:
        model: the model.
        names: as `extra_trainable` in LiftConfig.
        managed: the weights that LIFT manages.

    Returns:
        Full names of the parameters.

    Raises:
        ValueError: when a name matches nothing, or matches a managed weight.
    """
    parameters = dict(model.named_parameters())
    managed_weights = {target.full_name for target in managed.values()}
    found: set[str] = set()
    for pattern in names:
        hits = {name for name in parameters if matches(name, pattern)}
        for name, module in model.named_modules():
            if matches(name, pattern):
                hits |= {f"{name}.{below}" for below, _ in module.named_parameters()} & parameters.keys()
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


def unmanaged_summary(model: nn.Module, targets: Targets) -> list[str]:
    """List the matrices and stacks of matrices that stay frozen although they are neither embedding nor head.

    Args:
        model: the model.
        targets: what `find_targets` found.

    Returns:
        One entry per kind, as "model.layers.*.mlp.experts.down_proj [8, 64, 128] x 2".
    """
    reserved = reserved_weights(model)
    known = {id(target.weight) for target in targets.weights.values()}
    known |= {id(target.weight) for name, target in _matrices(model) if name in targets.left_frozen}  # said apart
    named = []
    for name, parameter in model.named_parameters():
        shape = logical_shape(parameter)
        if len(shape) >= 2 and name not in targets.dense and id(parameter) not in reserved | known:
            named.append(f"{name} {list(shape)}")
    return kinds_of(named)


def kinds_of(names: Iterable[str]) -> list[str]:
    """Gather names that differ in the numbers of their layers, as "model.layers.*.mlp.down_proj x 24"."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"[.][0-9]+(?=[.]|$)", ".*", name), []).append(name)
    return [f"{kind} x {len(found)}" if len(found) > 1 else found[0] for kind, found in kinds.items()]


def _candidates(model: nn.Module, matrices: dict[str, Target]) -> dict[str, Target]:
    reserved = reserved_weights(model)
    candidates = {name: target for name, target in matrices.items() if id(target.weight) not in reserved}
    if not candidates:
        raise ValueError(
            f"{type(model).__name__} has no layer LIFT can manage: no matrix{kind_list(model)} other than embeddings "
            "and the output head"
        )
    return candidates


def _excluded(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Names of the modules that are named, and of all below them."""
    modules = [name for name, _ in model.named_modules() if name]
    excluded: set[str] = set()
    for pattern in names:
        hits = {name for name in modules if f".{pattern}." in f".{name}."}
        if not hits:
            parts = sorted({part for name in modules for part in name.split(".") if not part.isdecimal()})
            raise ValueError(f"exclude_modules name {pattern!r} matches no module{_suggest(pattern, parts)}")
        excluded |= hits
    return excluded


def _module_of(target: Target) -> str:
    return target.full_name.rpartition(".")[0]


def _named(
    model: nn.Module,
    target_modules: str | tuple[str, ...] | None,
    candidates: dict[str, Target],
    matrices: dict[str, Target],
) -> dict[str, Target]:
    """The candidates that `target_modules` names; all where it is None."""
    if target_modules is None:
        return candidates
    patterns = TARGET_PRESETS[target_modules] if isinstance(target_modules, str) else target_modules
    chosen = {name: target for name, target in candidates.items() if any(matches(name, own) for own in patterns)}
    unmatched = [p for p in patterns if not any(matches(name, p) for name in chosen)]
    if unmatched and (not isinstance(target_modules, str) or not chosen):
        _refuse_unmatched(model, target_modules, unmatched, candidates, matrices)
    return chosen


def _without_excluded(config: LiftConfig, chosen: dict[str, Target], excluded: Collection[str]) -> dict[str, Target]:
    left = {
        name: target for name, target in chosen.items() if name not in excluded and _module_of(target) not in excluded
    }
    patterns = config.target_modules if isinstance(config.target_modules, tuple) else ()
    for pattern in patterns:
        if not any(matches(name, pattern) for name in left):
            raise ValueError(f"target_modules name {pattern!r} matches only layers that exclude_modules leaves out")
    if not left:
        raise ValueError(f"exclude_modules={list(config.exclude_modules)} leaves no layer that LIFT could manage")
    return left


def _new_heads(model: nn.Module, apart: Collection[str]) -> tuple[tuple[str, ...], set[str]]:
    """Names of the model's own new heads, and of their parameters, without what the user has frozen.

    Args:
        model: the model.
        apart: names of the modules that are excluded, or managed by name.
    """
    dense = {
        name
        for name, parameter in model.named_parameters()
        if name.split(".")[0] in NEW_HEADS and parameter.requires_grad and name.rpartition(".")[0] not in apart
    }
    return tuple(sorted({name.split(".")[0] for name in dense})), dense


def _without_frozen(model: nn.Module, chosen: dict[str, Target], frozen: Collection[str]) -> dict[str, Target]:
    if len(frozen) == len(chosen):
        raise ValueError(
            f"all {len(chosen)} layers of {type(model).__name__} that LIFT could manage are frozen (requires_grad is "
            f"False, as of {next(iter(chosen.values())).full_name}); LIFT leaves alone what was frozen before. "
            "Name the layers in target_modules, or call model.requires_grad_(True) before lift_ds.attach"
        )
    return {name: target for name, target in chosen.items() if name not in frozen}


def reserved_weights(model: nn.Module) -> set[int]:
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
    candidates: dict[str, Target],
    matrices: dict[str, Target],
) -> None:
    for pattern in unmatched:
        for name in matrices:
            if matches(name, pattern):
                raise ValueError(
                    f"target_modules: {name} is the output head or shares its weight with an embedding; LIFT does not "
                    "manage it"
                )
    names = sorted({name.rsplit(".", 1)[-1] for name in candidates})
    raise ValueError(
        f"target_modules={target_modules!r}: no matrix of {type(model).__name__} is named "
        f"{' or '.join(map(repr, unmatched))}{_suggest(unmatched[0], names)}"
    )


def _suggest(pattern: str, names: list[str]) -> str:
    nearest = difflib.get_close_matches(pattern, names, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"{hint}; there are {', '.join(names)}"


def _refuse_shared(model: nn.Module, chosen: dict[str, Target]) -> None:
    managed = {id(target.weight): name for name, target in chosen.items()}
    for other, module in model.named_modules():
        for parameter, value in module.named_parameters(recurse=False):
            name = managed.get(id(value))
            own = other if parameter == "weight" else f"{other}.{parameter}".lstrip(".")
            if name is not None and name != own:
                raise ValueError(
                    f"target_modules: {own} and {name} share one weight; LIFT trains a weight in one layer only, so "
                    "leave both out, by exclude_modules or by naming others"
                )
