"""What memory and network come to, from the sizes of a model alone; the planner's only source of figures.

Symbols: M entries of the managed matrices, K trained entries, d = K/M the density, U entries of all other parameters
(frozen), N ranks. Weights and gradients are bf16, 2 bytes; master values and moments fp32. The table in the docstring
of each function is what it computes; index is the size of an index over that of its matrix. `benchmarks/footprint.py`
counts the same quantities in real runs of DeepSpeed and puts these beside them; what a formula follows from is
DeepSpeed's and transformers' code, read with those counts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import compress, zip_longest

from lift_ds.index.encoding import word_count
from lift_ds.model.layers import GRADIENT_TILE
from lift_ds.runtime.ranks import shard_size

#: Categories of persistent bytes, in the order of the tables.
WEIGHTS, UNMANAGED, TRAINED, INDEX = "weights", "unmanaged", "trained apart", "index"
GRADIENTS, MASTER, MOMENTS, OTHER = "gradients", "master", "moments", "other"
CATEGORIES = (WEIGHTS, UNMANAGED, TRAINED, INDEX, GRADIENTS, MASTER, MOMENTS, OTHER)

#: How the kinds of collectives end that stay within the ranks that share a copy of the frozen weights.
IN_NODE = " in node"

#: Bytes of a value in bf16, of one in fp32, and of a word of an index.
LOW, HIGH, WORD = 2, 4, 4


@dataclass(frozen=True)
class Uses:
    """Where a model uses its weights, in entries; ZeRO-3 fetches them by it.

    Args:
        first_inputs: of the managed matrices that see the embeddings, whose input needs no gradient.
        early: of the frozen parameters that come before all that is trained: no backward reaches them.
        last_products: of the managed matrices whose product ends a layer, and is not computed again.
        ends: of the embeddings and of the head, where they are frozen.
        tied: of the head where it is an embedding too, and so is used twice; `ends` has them twice.
        idle: of the managed matrices of experts, those that a token does not pass.
        stack: of the largest stack of experts, whose dense gradient is whole for a moment.
        together: of the managed weights that ZeRO-3 fetches at once, where it fetches several: those of a module that
            has two stacks, or of a leaf module. They arrive in a buffer as large as they are.
    """

    first_inputs: int = 0
    early: int = 0
    last_products: int = 0
    ends: int = 0
    tied: int = 0
    idle: int = 0
    stack: int = 0
    together: int = 0


@dataclass(frozen=True)
class Setting:
    """One run, by its sizes; `estimate.setting_for` makes it for a model.

    Args:
        method: "full" (the managed matrices alone), "lora" or "lift".
        stage: of ZeRO.
        ranks: N.
        shapes: [m, n] of the managed weights; the matrices of a stack are one below the other.
        trained: elements of each adapter; in full fine-tuning of each weight; for "lift" k of each weight, in the order
            of `shapes`.
        dense: shape of each parameter that is trained densely beside.
        others: elements of each frozen parameter beside.
        block_shape: of the blocks that an index is made of.
        bucket: elements of DeepSpeed's reduce bucket.
        live: elements that ZeRO-3 may keep gathered (`stage3_max_live_parameters`, `stage3_max_reuse_distance`).
        offload: whether master values, moments and their update are on the host.
        tile: entries of a weight's gradient that LIFT forms at a time.
        placement: of the index in ZeRO 1 and 2, "sharded" or "replicated".
        checkpointing: whether a layer is computed again in its backward.
        uses: where the model uses its weights.
        layers: L.
        stacks: for each weight whether it is a stack of matrices; none is where this is empty.
        leaves: for each weight whether it is in a leaf module, with which ZeRO-3 fetches θ and the index too.
        copy_ranks: n, the ranks that share a copy of the frozen weights in ZeRO-3, of LIFT; 0 for all.
    """

    method: str
    stage: int
    ranks: int
    shapes: tuple[tuple[int, int], ...]
    trained: tuple[int, ...]
    dense: tuple[tuple[int, ...], ...] = ()
    others: tuple[int, ...] = ()
    block_shape: tuple[int, int] = (1, 1)
    bucket: int = 0
    live: int = 0
    offload: bool = False
    tile: int = GRADIENT_TILE
    placement: str = "sharded"
    checkpointing: bool = False
    uses: Uses = Uses()
    layers: int = 1
    stacks: tuple[bool, ...] = ()
    leaves: tuple[bool, ...] = ()
    copy_ranks: int = 0

    @property
    def sharers(self) -> int:
        """How many ranks share a copy of the frozen weights."""
        return self.copy_ranks or self.ranks

    @property
    def managed(self) -> int:
        """M."""
        return sum(rows * columns for rows, columns in self.shapes)

    @cached_property
    def groups(self) -> list[list[int]]:
        """Elements of each trained parameter, by the groups of LiftAdamW: vectors have one of their own."""
        groups: list[list[int]] = [[*self.trained], []]
        for shape in self.dense:
            groups[len(shape) < 2].append(math.prod(shape))
        return groups

    @property
    def total_trained(self) -> int:
        """K, with what is trained densely beside."""
        return sum(map(sum, self.groups))

    @property
    def unmanaged(self) -> int:
        """U."""
        return sum(self.others)

    @property
    def parameters(self) -> int:
        """Elements of the model, θ and adapters apart."""
        return self.managed + sum(map(math.prod, self.dense)) + self.unmanaged

    @cached_property
    def index_words(self) -> list[int]:
        """Words of each whole index; none without LIFT."""
        if self.method != "lift":
            return []
        return [word_count(*shape, k, self.block_shape) for shape, k in zip(self.shapes, self.trained, strict=True)]

    @property
    def kept(self) -> float:
        """Elements that ZeRO-3 keeps gathered from forward to backward.

        DeepSpeed keeps what is used again within as many elements as `live`, of both passes together.
        """
        return min(self.parameters, self.live / 2)

    def share(self, elements: Iterable[int]) -> int:
        """Return how many elements a rank holds of parameters that are each cut into N equal shards."""
        return sum(shard_size(count, self.ranks) for count in elements)

    def share_of_copy(self, elements: Iterable[int]) -> int:
        """Return the same of frozen parameters, which are each cut into n equal shards."""
        return sum(shard_size(count, self.sharers) for count in elements)

    def among_sharers(self, kind: str) -> str:
        """Return the kind of a collective of the ranks that share a copy."""
        return kind + IN_NODE if self.sharers < self.ranks else kind


def ring_share(kind: str, ranks: int) -> float:
    """Return the bytes a rank receives in a collective by a ring algorithm, per logical byte (mean over the ranks).

    What is sent from one rank to another is received once.
    """
    if kind == "send":
        return 1.0
    passes = 2 if kind == "all_reduce" else 1
    return passes * (ranks - 1) / ranks


def whole_index(setting: Setting) -> int:
    """Return the bytes of all indices, whole."""
    return WORD * sum(setting.index_words)


def index_share(setting: Setting) -> int:
    """Return the bytes a rank holds of indices that are cut into N shards, or n in copies for n ranks."""
    return WORD * setting.share_of_copy(setting.index_words)


def partition_size(elements: int, ranks: int) -> int:
    """Return the elements of each of the N partitions of a group in ZeRO 1 and 2, an even number."""
    return 2 * shard_size(elements, 2 * ranks)


def own_partitions(setting: Setting) -> int:
    """Return the elements of the partitions of all groups that a rank updates in ZeRO 1 and 2."""
    return sum(partition_size(sum(group), setting.ranks) for group in setting.groups)


def largest_partition(setting: Setting) -> int:
    """Return the elements of all parameters that have a part in one partition of ZeRO 1 or 2; the most of any rank.

    The parameters of a group lie end to end in one flat buffer of N equal partitions.
    """
    found = [0] * setting.ranks
    for group in setting.groups:
        size, start = partition_size(sum(group), setting.ranks), 0
        for count in group:
            for rank in range(start // size, (start + count - 1) // size + 1):
                found[rank] += count
            start += count
    return max(found)


def persistent(setting: Setting) -> dict[str, float]:
    """Bytes that a rank holds between steps, by category; of gradients what it holds between backward and step.

        per managed parameter     ZeRO-0     ZeRO-1/2            ZeRO-3
        weights                   2          2                   2/N
        θ or adapters             2 d        2 d                 2 d/N         none in full fine-tuning
        gradients                 2 d        2 d/N               2 d/N         d = 1 in full fine-tuning; ZeRO-1 too
        index, LIFT               index      1/N of it; or it    1/N of it     sharded or replicated
        master; moments           4 d; 8 d   4 d/N; 8 d/N        4 d/N; 8 d/N
        other                     -          -                   one reduce bucket

    Where n ranks share a copy of the frozen weights, weights and index of ZeRO-3 are 2/n and 1/n. What is trained
    densely beside counts as θ does, with d = 1 of its own.
    In ZeRO-1 as in 2 DeepSpeed holds after backward the gradients of a rank's own partition; of a parameter cut by the
    border of a partition it holds all of it on both sides, which shows where parameters are few. Offloaded, master,
    moments and (in ZeRO-1/2) the gradients are on the host, see `host_memory`.

    Args:
        setting: the run.

    Returns:
        Category -> bytes.
    """
    trained = setting.total_trained
    found: dict[str, float] = dict.fromkeys(CATEGORIES, 0.0)
    if setting.stage == 3:
        shard = sum(map(setting.share, setting.groups))
        found[WEIGHTS] = LOW * setting.share_of_copy(map(math.prod, setting.shapes))
        found[UNMANAGED] = LOW * setting.share_of_copy(setting.others)
        found[TRAINED] = LOW * shard
        found[GRADIENTS] = LOW * shard
        found[INDEX] = index_share(setting)
        found[OTHER] = LOW * setting.bucket
    else:
        shard = trained if setting.stage == 0 else own_partitions(setting)
        found[WEIGHTS] = LOW * setting.managed
        found[UNMANAGED] = LOW * setting.unmanaged
        found[TRAINED] = LOW * trained
        found[GRADIENTS] = LOW * (trained if setting.stage == 0 else largest_partition(setting)) * (not setting.offload)
        sharded = setting.stage > 0 and setting.placement == "sharded"
        found[INDEX] = index_share(setting) if sharded else whole_index(setting)
    found[MASTER] = 0.0 if setting.offload else HIGH * shard
    found[MOMENTS] = 2 * found[MASTER]
    if setting.method == "full":
        found[TRAINED] = 0.0  # the weights themselves
    return found


def network_step(setting: Setting) -> dict[str, float]:
    """Logical bytes of the collectives of a step without a refresh, by kind.

        per managed parameter     ZeRO-0     ZeRO-1/2              ZeRO-3
        gradients                 2 d        2 d                   2 d           all_reduce; ZeRO-3 reduce_scatter
        updated values            -          2 d                   -             all_gather
        weights                   -          -                     2 + 2         all_gather, forward and backward
        θ and index of a leaf     -          -                     2 d+2 d+index likewise; of other modules nothing
        adapters, LoRA            -          -                     2 d + 2 d     likewise; what is dense beside too
        index, sharded            -          index                 index         all_gather, once, in backward
        θ and index, write-back   -          -                     2 d + index

    d = 1 in full fine-tuning, whose values are its weights; a replicated index is not gathered. A single rank gathers
    nothing; DeepSpeed reduces all the same. Where n ranks share a copy of the frozen weights, these and the index are
    gathered from them alone, and stand under kinds of their own that end with `IN_NODE`. ZeRO-3 in detail:

        - LoRA needs no weight in backward whose input needs no gradient (query, key, value of the first layer).
        - Frozen parameters are fetched forward and backward too, but for those before all that is trained, which no
          backward reaches: the embeddings, as a rule. Where these are the head too, they are fetched for each.
        - Activation checkpointing lets backward reach these, and fetches what lies within layers once more, but for the
          last product of a layer, which is not computed again (LoRA's is, its adapter comes after it).
        - What `live` lets it keep from forward to backward is not fetched again. In full fine-tuning neither is a
          layer from its second forward to its backward; frozen weights are let go of there whatever the limit.

    Args:
        setting: the run.

    Returns:
        Kind -> bytes; kinds without any are absent.
    """
    n, trained = setting.ranks, setting.total_trained
    gradients = LOW * trained
    if setting.stage < 3:
        found = {"all_reduce": float(gradients)}
        if setting.stage > 0 and n > 1:
            found["all_gather"] = float(LOW * n * own_partitions(setting))
            if setting.placement == "sharded":
                found["all_gather"] += n * index_share(setting)
        return found
    if n == 1:
        return {"reduce_scatter": float(gradients)}
    again = 1 - setting.kept / setting.parameters
    frozen = LOW * _weights_fetched(setting)
    gathered = (1 + again) * LOW * n * setting.share(map(math.prod, setting.dense))
    if setting.method == "lora":
        gathered += (1 + (1 + setting.checkpointing) * again) * LOW * n * setting.share(setting.trained)
    elif setting.method == "lift":
        forwards = (1 + setting.checkpointing) * again
        values, words = in_leaves(setting)
        gathered += n * LOW * (setting.share(setting.trained) + (1 + forwards) * setting.share(values))
        frozen += setting.sharers * (2 * index_share(setting) + forwards * WORD * setting.share_of_copy(words))
    fetched = Counter({"all_gather": float(gathered)})
    if setting.sharers > 1:
        fetched[setting.among_sharers("all_gather")] += frozen  # type: ignore[assignment]  # counters take any number
    return {"reduce_scatter": float(gradients), **fetched}


def written_back(setting: Setting) -> dict[str, float]:
    """Logical bytes of θ and index, which ZeRO-3 gathers for LIFT's write-back, by kind; a part of `network_step`."""
    found = Counter({"all_gather": setting.ranks * LOW * setting.share(setting.trained)})
    if setting.sharers > 1:
        found[setting.among_sharers("all_gather")] += setting.sharers * index_share(setting)
    return {kind: float(size) for kind, size in found.items()}


def in_leaves(setting: Setting) -> tuple[list[int], list[int]]:
    """Return the elements of each θ and the words of each index that ZeRO-3 fetches with a leaf module."""
    return [*compress(setting.trained, setting.leaves)], [*compress(setting.index_words, setting.leaves)]


def _weights_fetched(setting: Setting) -> float:
    """Elements of weights and frozen parameters that ZeRO-3 fetches in a step."""
    total, uses = setting.managed + setting.unmanaged, setting.uses
    used = total + uses.tied
    if not setting.checkpointing:
        first = uses.first_inputs if setting.method == "lora" else 0
        return max(total, 2 * used - uses.early - first - setting.kept)
    again = used - uses.ends - (uses.last_products if setting.method != "lora" else 0)
    if setting.method == "full" and setting.live >= total // setting.layers:
        again = 0
    return max(total, 2 * used - setting.kept) + again


def network_refresh(setting: Setting) -> dict[str, float]:
    """Logical bytes that a refresh adds to its step, by kind.

        per managed parameter     ZeRO-1/2                ZeRO-3
        weights to their owner    -                       2             gather
        of stacks                 -                       2 (N-1)/N/N   send, by a rank, of what is not at its owner
        new index                 the index               the index     broadcast by the owner
        new weights there         -                       2 d           broadcast by the owner
        old index                 -                       the index     all_gather
        states                    -                       -             all_to_all, of what changes its rank

    Where n ranks share a copy of the frozen weights, weights and old index come from these, as in `network_step`; an
    owner is in one of the N/n groups of them. What changes its rank depends on the weights, and is little: a refresh
    that replaces a part of the entries at random moves about the square root of their number across each border
    between two ranks.

    Args:
        setting: a run of LIFT.

    Returns:
        Kind -> bytes; kinds without any are absent. Nothing in ZeRO-0, where every rank selects alike. A single rank
        passes most of this through its collectives too, of which nothing crosses a network.
    """
    if setting.stage == 0:
        return {}
    entries, index = sum(setting.trained), whole_index(setting)
    if setting.stage < 3:
        return {"broadcast": float(index)}
    n = setting.sharers
    found = {"broadcast": float(index + LOW * entries)}
    found[setting.among_sharers("all_gather")] = float(n * index_share(setting))
    if n > 1:
        sizes = [*map(math.prod, setting.shapes)]
        stacked = sum(compress(sizes, setting.stacks))
        alone = [size for size, stack in zip_longest(sizes, setting.stacks) if not stack]
        if alone:
            found[setting.among_sharers("gather")] = float(LOW * n * setting.share_of_copy(alone)) * n / setting.ranks
        if stacked:
            found[setting.among_sharers("send")] = LOW * stacked * (n - 1) / n / setting.ranks
    return found
