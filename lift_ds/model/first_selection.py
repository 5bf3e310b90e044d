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
from lift_ds.index.access import access_to
from lift_ds.index.encoding import CompactIndex, IndexLayout, encode, stacked
from lift_ds.model.partition import is_partitioned, partition_of
from lift_ds.model.weights import matrix_names
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
class FrozenWeight:
    """A weight that is selected in.

    Args:
        weight: as the model has it, whole or partitioned.
        layout: of its index.
    """

    weight: Any
    layout: IndexLayout

    @property
    def size(self) -> MatrixSize:
        """Of one matrix."""
        return MatrixSize.of(self.shape, self.weight.element_size())

    @property
    def shape(self) -> tuple[int, int]:
        """[m, n] of one matrix."""
        return self.layout.of_one.rows, self.layout.columns

    def collected(self, number: int, owner: int) -> Tensor | None:
        """Return a matrix [m, n] on its owner, None on the other ranks; all of them call."""
        start = number * self.size.entries
        found = partition_of(self.weight).collected(self.weight, owner, (start, start + self.size.entries))
        return None if found is None else found.view(self.shape)


@dataclass(frozen=True)
class Principal:
    """What a weight begins its training with.

    Args:
        values: θ [k]; zeros where a checkpoint is to bring it, and then the words are zeros too.
        words: I as it is stored, int32.
        layout: what the words mean.
    """

    values: Tensor
    words: Tensor
    layout: IndexLayout


def layout_of(sizes: tuple[int, int, int], config: LiftConfig) -> IndexLayout:
    """Return what the words of the index of a weight mean, of matrices and their rows and columns."""
    matrices, rows, columns = sizes
    entries = matrices * config.entries(rows, columns)
    return IndexLayout(matrices * rows, columns, entries, config.block_shape, matrices)


def reserved(frozen: FrozenWeight) -> Principal:
    """Return room for what a checkpoint, or nobody, will fill; on the device of the weight."""
    weight, layout = frozen.weight, frozen.layout
    values = torch.zeros(layout.entries, dtype=_values_dtype(weight), device=weight.device)
    return Principal(values, torch.zeros(layout.word_count(), dtype=torch.int32, device=weight.device), layout)


@torch.no_grad()
def select_first(
    weights: Mapping[str, FrozenWeight], config: LiftConfig
) -> tuple[dict[str, Principal], dict[str, Tensor], int]:
    """Select in all matrices; all ranks call, with the same weights.

    With N ranks each selects in at most ceil(M / N) + 1 of the M matrices. Collectives: for partitioned weights a
    gather each, one all-gather in all, and two broadcasts a matrix (index; subspace, or in ZeRO-3 the weights there).

    Args:
        weights: by name.
        config: the settings.

    Returns:
        Name -> what the weight begins with, whole on every rank; name of a matrix -> what "chebyshev" starts from at
        the next refresh; and in how many it fell back to "gram".

    Raises:
        ValueError: on every rank, when a weight has NaN or infinite entries, or does not fit `refresh_memory_gib`.
    """
    start, (_, ranks) = time.perf_counter(), rank_and_count()
    watchdog.start(config.stall_timeout)
    matrices = _matrices(weights)
    jobs = deal_first(weights, config, ranks)
    with watchdog.during("the first selection"):
        own: dict[str, _Own] = {}

        def select(name: str, whole: Tensor) -> None:
            own[name] = _select_one(name, whole, matrices[name][0], config)

        failure = in_rounds(
            jobs,
            lambda name, owner: matrices[name][0].collected(matrices[name][1], owner),
            select,
            about="LIFT selection",
        )
        shapes, fell_back = _agree(own, failure)
        owners = {name: owner for owner, names in enumerate(jobs) for name in names}
        found, subspaces = {}, {}
        for name, frozen in weights.items():
            handed = []
            for matrix in matrix_names(name, frozen.layout.matrices):
                words, current, subspace = _hand_out(frozen, own.pop(matrix, None), owners[matrix], shapes[matrix])
                handed.append((words, current))
                if subspace is not None:
                    subspaces[matrix] = subspace
            found[name] = _put_together(frozen, handed)
    if ranks > 1:
        logger.info(
            "LIFT selected in %d matrices, dealt out over %d ranks (at most %d on one), in %.2f s",
            len(matrices), ranks, max(map(len, jobs)), time.perf_counter() - start,
        )  # fmt: skip
    return found, subspaces, fell_back


def _matrices(weights: Mapping[str, FrozenWeight]) -> dict[str, tuple[FrozenWeight, int]]:
    """Return the matrices by name: of which weight, and their number in it."""
    return {
        matrix: (frozen, number)
        for name, frozen in weights.items()
        for number, matrix in enumerate(matrix_names(name, frozen.layout.matrices))
    }


def deal_first(weights: Mapping[str, FrozenWeight], config: LiftConfig, ranks: int) -> list[list[str]]:
    """Return for each rank the names of the matrices it selects in first, longest first; from shapes alone."""
    matrices, costs = _matrices(weights), []
    for frozen, _ in matrices.values():
        settings = settings_for(frozen.size, config, _selection_device(frozen.weight).type)
        costs.append(selection_cost(*frozen.shape, settings.lra_rank, settings.solver))
    names = list(matrices)
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


def _select_one(name: str, whole: Tensor, frozen: FrozenWeight, config: LiftConfig) -> _Own:
    """Select in one matrix.

    Args:
        name: of the matrix.
        whole: it [m, n].
        frozen: the weight that it is, or is one of.
        config: the settings.
    """
    device, layout = _selection_device(whole), frozen.layout.of_one
    settings = _settings(name, frozen, config, device)
    with watchdog.during(f"selecting in {name}"):
        found = select_in(name, whole.to(device), settings)
    index = found.index.to(whole.device)
    words = encode(index, layout.rows, layout.columns, layout.block_shape)
    current = whole.reshape(-1)[index] if is_partitioned(frozen.weight) else None
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
    frozen: FrozenWeight, own: _Own | None, owner: int, subspace_shape: torch.Size | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Give every rank what an owner found in one matrix.

    Args:
        frozen: the weight that it is, or is one of.
        own: what this rank found, if it is the owner.
        owner: the rank.
        subspace_shape: of its subspace; None where it has none.

    Returns:
        The words of its index, the weights there where the weight is partitioned, and the subspace.
    """
    weight, layout = frozen.weight, frozen.layout.of_one
    words = _from(owner, None if own is None else own.words, [layout.word_count()], torch.int32).to(weight.device)
    current = subspace = None
    if is_partitioned(weight):
        current = _from(owner, None if own is None else own.current, [layout.entries], weight.dtype)
    if subspace_shape is not None:
        subspace = _from(owner, None if own is None else own.found.subspace, subspace_shape, torch.float16).cpu()
    return words, current, subspace


def _put_together(frozen: FrozenWeight, handed: Sequence[tuple[Tensor, Tensor | None]]) -> Principal:
    """Return what a weight begins with, from words and, where it is partitioned, weights of each of its matrices."""
    weight = frozen.weight
    words = stacked([words for words, _ in handed], frozen.layout)
    if is_partitioned(weight):
        current = torch.cat([current for _, current in handed if current is not None])
    else:
        current = weight.new_empty(frozen.layout.entries)
        access_to(CompactIndex(words, frozen.layout)).gather(weight.detach().view(-1), 0, current)
    return Principal(current.to(weight.device, _values_dtype(weight)), words, frozen.layout)


def _from(owner: int, tensor: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a tensor of the owner; a broadcast, if there are other ranks."""
    if rank_and_count()[1] == 1:
        assert tensor is not None, "one process owns every matrix"
        return tensor
    device = exchange_device()
    tensor = torch.empty(*shape, dtype=dtype, device=device) if tensor is None else tensor.to(device).contiguous()
    broadcast(tensor, owner)
    return tensor


def _settings(name: str, frozen: FrozenWeight, config: LiftConfig, device: torch.device) -> SelectionSettings:
    """Return how to select in one matrix; one of a partitioned weight is copied to its owner."""
    size = frozen.size
    if criterion_named(config.criterion).gradient:  # until gradients are measured, with the optimizer there
        config = replace(config, criterion=UNTIL_MEASURED)
    copied = size.bytes if is_partitioned(frozen.weight) else 0
    return bounded(name, size, settings_for(size, config, device.type), config.refresh_memory_gib, reserved=copied)


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
