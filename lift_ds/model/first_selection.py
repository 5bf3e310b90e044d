"""The first selection: in the weights as they are when LIFT is attached, dealt out over the ranks there are.

    select     in each round every rank selects in one whole matrix (ZeRO-3: gathered to it)
    agree      all ranks learn whether a selection failed anywhere
    hand out   one matrix after the other: its owner broadcasts index, subspace, and in ZeRO-3 the weights at the index

Afterwards every rank has what it would have by selecting in all matrices itself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lift_ds.config import LiftConfig
from lift_ds.index.encoding import CompactIndex, IndexLayout, encode
from lift_ds.model.partition import is_partitioned, logical_shape, partition_of
from lift_ds.runtime import watchdog
from lift_ds.runtime.logs import get_logger
from lift_ds.runtime.ranks import broadcast, deal_out, exchange_device, in_rounds, rank_and_count, together
from lift_ds.selection import MatrixSize, Selected, SelectionSettings, selection_cost
from lift_ds.selection.cost import most_matrices
from lift_ds.selection.criteria import criterion_named
from lift_ds.selection.memory import bounded
from lift_ds.selection.select import select_in
from lift_ds.selection.settings import settings_for

logger = get_logger()

#: Criterion of the first selection, where a criterion looks at gradients: it costs little.
UNTIL_MEASURED = "magnitude"


@dataclass(frozen=True)
class Principal:
    """What a layer begins its training with.

    Args:
        values: θ [k]; zeros where a checkpoint is to bring it, and then the words are zeros too.
        words: I as it is stored, int32.
        layout: what the words mean.
        subspace: what "chebyshev" starts from at the next refresh; None from other solvers.
    """

    values: Tensor
    words: Tensor
    layout: IndexLayout
    subspace: Tensor | None = None


def layout_of(weight: Any, config: LiftConfig) -> IndexLayout:
    """Return what the words of the index of a weight mean."""
    rows, columns = logical_shape(weight)
    return IndexLayout(rows, columns, config.entries(rows, columns), config.block_shape)


def reserved(weight: Any, config: LiftConfig) -> Principal:
    """Return room for what a checkpoint, or nobody, will fill; on the device of the weight."""
    layout = layout_of(weight, config)
    values = torch.zeros(layout.entries, dtype=_values_dtype(weight), device=weight.device)
    return Principal(values, torch.zeros(layout.word_count(), dtype=torch.int32, device=weight.device), layout)


@torch.no_grad()
def select_first(weights: Mapping[str, Any], config: LiftConfig) -> tuple[dict[str, Principal], int]:
    """Select in all weights; all ranks call, with the same weights.

    With N ranks each selects in at most ceil(M / N) + 1 of the M matrices. Collectives: for partitioned weights a
    gather each, one all-gather in all, and two broadcasts a matrix (index; subspace, or in ZeRO-3 the weights there).

    Args:
        weights: dotted name of the layer -> its weight, whole or partitioned.
        config: the settings.

    Returns:
        Name -> what the layer begins with, whole on every rank, and in how many "chebyshev" fell back to "gram".

    Raises:
        ValueError: on every rank, when a weight has NaN or infinite entries, or does not fit `refresh_memory_gib`.
    """
    start, (_, ranks) = time.perf_counter(), rank_and_count()
    watchdog.start(config.stall_timeout)
    jobs = deal_first(weights, config, ranks)
    with watchdog.during("the first selection"):
        own: dict[str, _Own] = {}

        def select(name: str, whole: Tensor) -> None:
            own[name] = _select_one(name, whole, weights[name], config)

        failure = in_rounds(
            jobs,
            lambda name, owner: partition_of(weights[name]).collected(weights[name], owner),
            select,
            about="LIFT selection",
        )
        shapes, fell_back = _agree(own, failure)
        owners = {name: owner for owner, names in enumerate(jobs) for name in names}
        found = {
            name: _hand_out(weight, own.pop(name, None), owners[name], layout_of(weight, config), shapes[name])
            for name, weight in weights.items()
        }
    if ranks > 1:
        logger.info(
            "LIFT selected in %d matrices, dealt out over %d ranks (at most %d on one), in %.2f s",
            len(weights), ranks, max(map(len, jobs)), time.perf_counter() - start,
        )  # fmt: skip
    return found, fell_back


def deal_first(weights: Mapping[str, Any], config: LiftConfig, ranks: int) -> list[list[str]]:
    """Return for each rank the names of the matrices it selects in first, longest first; from shapes alone."""
    costs = []
    for weight in weights.values():
        rows, columns = logical_shape(weight)
        settings = settings_for(_size(weight), config, _selection_device(weight).type)
        costs.append(selection_cost(rows, columns, settings.lra_rank, settings.solver))
    names = list(weights)
    return [[names[job] for job in jobs] for jobs in deal_out(costs, ranks, most_matrices(len(names), ranks))]


@dataclass(frozen=True)
class _Own:
    """What an owner found in one matrix.

    Args:
        words: the index as it is stored.
        current: the weights there [k], where the weight is partitioned.
        found: how it was found.
    """

    words: Tensor
    current: Tensor | None
    found: Selected


def _select_one(name: str, whole: Tensor, weight: Any, config: LiftConfig) -> _Own:
    """Select in one matrix.

    Args:
        name: of the layer.
        whole: its weight [m, n].
        weight: the same as the model has it.
        config: the settings.
    """
    device, layout = _selection_device(whole), layout_of(weight, config)
    settings = _settings(name, weight, config, device)
    with watchdog.during(f"selecting in {name}"):
        found = select_in(name, whole.to(device), settings)
    index = found.index.to(whole.device)
    words = encode(index, layout.rows, layout.columns, layout.block_shape)
    current = whole.reshape(-1)[index] if is_partitioned(weight) else None
    return _Own(words, current, replace(found, index=index[:0]))


def _agree(own: Mapping[str, _Own], failure: str) -> tuple[dict[str, torch.Size | None], int]:
    """Return the shapes of all subspaces by name, and how many selections fell back; one all-gather.

    Raises:
        ValueError: on every rank, if a selection failed on any; with the first one's text.
    """

    def about() -> tuple[dict[str, torch.Size | None], int]:
        if failure:
            raise ValueError(failure)
        found = {name: one.found for name, one in own.items()}
        shapes = {name: None if one.subspace is None else one.subspace.shape for name, one in found.items()}
        return shapes, sum(one.fell_back for one in found.values())

    everyone = together(about)
    return {name: shape for shapes, _ in everyone for name, shape in shapes.items()}, sum(
        count for _, count in everyone
    )


def _hand_out(
    weight: Any, own: _Own | None, owner: int, layout: IndexLayout, subspace_shape: torch.Size | None
) -> Principal:
    """Give every rank what an owner found in one matrix.

    Args:
        weight: as the model has it.
        own: what this rank found, if it is the owner.
        owner: the rank.
        layout: of the index.
        subspace_shape: of its subspace; None where it has none.
    """
    words = _from(owner, None if own is None else own.words, [layout.word_count()], torch.int32).to(weight.device)
    if is_partitioned(weight):
        current = _from(owner, None if own is None else own.current, [layout.entries], weight.dtype)
    else:
        current = weight.detach().reshape(-1)[CompactIndex(words, layout).positions().long()]
    subspace = None
    if subspace_shape is not None:
        subspace = _from(owner, None if own is None else own.found.subspace, subspace_shape, torch.float16).cpu()
    return Principal(current.to(weight.device, _values_dtype(weight)), words, layout, subspace)


def _from(owner: int, tensor: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a tensor of the owner; a broadcast, if there are other ranks."""
    if rank_and_count()[1] == 1:
        assert tensor is not None, "one process owns every matrix"
        return tensor
    device = exchange_device()
    tensor = torch.empty(*shape, dtype=dtype, device=device) if tensor is None else tensor.to(device).contiguous()
    broadcast(tensor, owner)
    return tensor


def _settings(name: str, weight: Any, config: LiftConfig, device: torch.device) -> SelectionSettings:
    """Return how to select in one matrix; a partitioned one is copied to its owner."""
    size = _size(weight)
    if criterion_named(config.criterion).gradient:  # until gradients are measured, with the optimizer there
        config = replace(config, criterion=UNTIL_MEASURED)
    copied = size.bytes if is_partitioned(weight) else 0
    return bounded(name, size, settings_for(size, config, device.type), config.refresh_memory_gib, reserved=copied)


def _size(weight: Any) -> MatrixSize:
    return MatrixSize.of(logical_shape(weight), weight.element_size())


def _values_dtype(weight: Any) -> torch.dtype:
    # ZeRO-3 wants one dtype in a partitioned model; elsewhere θ is its own float32 master until DeepSpeed casts it, as
    # it is planned to on the meta device.
    keeps = is_partitioned(weight) or weight.is_meta or weight.dtype == torch.float64
    return weight.dtype if keeps else torch.float32


def _selection_device(weight: Any) -> torch.device:
    """Return where to factor a weight: its own device, or this rank's accelerator while the model is on the host."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None or weight.device.type != "cpu":
        return weight.device
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device(accelerator.type, local_rank if local_rank < torch.accelerator.device_count() else 0)
