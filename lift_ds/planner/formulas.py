"""What memory and network come to, from the sizes of a model alone; the planner's only source of figures.

Symbols: M entries of the managed matrices, K trained entries, d = K/M the density, U entries of all other parameters
(frozen), N ranks. Weights and gradients are bf16, 2 bytes; master values and moments fp32. The table in the docstring
of each function is what it computes. `benchmarks/footprint.py` counts the same quantities in real runs of DeepSpeed
and puts these beside them; what a formula follows from is DeepSpeed's and transformers' code, read with those counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lift_ds.model.layers import GRADIENT_TILE

#: Categories of persistent bytes, in the order of the tables.
WEIGHTS, UNMANAGED, TRAINED, INDEX = "weights", "unmanaged", "trained apart", "index"
GRADIENTS, MASTER, MOMENTS, OTHER = "gradients", "master", "moments", "other"
CATEGORIES = (WEIGHTS, UNMANAGED, TRAINED, INDEX, GRADIENTS, MASTER, MOMENTS, OTHER)

#: Bytes of a value in bf16 and in fp32.
LOW, HIGH = 2, 4


@dataclass(frozen=True)
class Setting:
    """One run, by its sizes.

    Args:
        method: "full" (the managed matrices alone), "lora" or "lift".
        stage: of ZeRO.
        ranks: N.
        shapes: [m, n] of the managed matrices.
        trained: elements of each trained parameter; for "lift" k of each matrix, in the order of `shapes`.
        unmanaged: U.
        bucket: elements of DeepSpeed's reduce bucket.
        live: elements that ZeRO-3 may keep gathered (`stage3_max_live_parameters`, `stage3_max_reuse_distance`).
        sub_group: elements that ZeRO-3 updates at a time.
        offload: whether master values, moments and their update are on the host.
        tile: entries of a weight's gradient that LIFT forms at a time.
        placement: of the index in ZeRO 1 and 2, "sharded" or "replicated".
        first_inputs: entries of the managed matrices that see the embeddings, whose input needs no gradient.
        checkpointing: whether a layer is computed again in its backward.
        last_products: entries of the managed matrices whose product ends a layer, and is not computed again.
        layers: L.
    """

    method: str
    stage: int
    ranks: int
    shapes: tuple[tuple[int, int], ...]
    trained: tuple[int, ...]
    unmanaged: int = 0
    bucket: int = 0
    live: int = 0
    sub_group: int = 10**9
    offload: bool = False
    tile: int = GRADIENT_TILE
    placement: str = "sharded"
    first_inputs: int = 0
    checkpointing: bool = False
    last_products: int = 0
    layers: int = 1

    @property
    def managed(self) -> int:
        """M."""
        return sum(rows * columns for rows, columns in self.shapes)

    @property
    def total_trained(self) -> int:
        """K."""
        return sum(self.trained)

    @property
    def kept(self) -> float:
        """Elements that ZeRO-3 keeps gathered from forward to backward.

        DeepSpeed keeps what is used again within as many elements as `live`, of both passes together.
        """
        return min(self.managed + self.unmanaged, self.live / 2)

    def share(self, elements: Iterable[int]) -> int:
        """Return how many elements a rank holds of parameters that are each cut into N equal shards."""
        return sum(-(-count // self.ranks) for count in elements)


def ring_share(kind: str, ranks: int) -> float:
    """Return the bytes a rank receives in a collective by a ring algorithm, per logical byte (mean over the ranks)."""
    passes = 2 if kind == "all_reduce" else 1
    return passes * (ranks - 1) / ranks


def index_sizes(setting: Setting) -> list[int]:
    """Return the bytes of each whole index: m row counts and k columns of 2 bytes each, rounded up to 4."""
    if setting.method != "lift":
        return []
    return [-(-(k + rows) // 2) * 4 for k, (rows, _) in zip(setting.trained, setting.shapes, strict=True)]


def largest_partition(setting: Setting) -> int:
    """Return the elements of all parameters that have a part in one partition of ZeRO 1 or 2; the most of any rank.

    The parameters lie end to end in one flat buffer of N equal partitions, of an even number of elements each.
    """
    size = -(-setting.total_trained // (2 * setting.ranks)) * 2
    found = [0] * setting.ranks
    start = 0
    for count in setting.trained:
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
        index, LIFT               2 d + 2/n  1/N of it; or it    1/N of it     n columns; replicated or sharded
        master; moments           4 d; 8 d   4 d/N; 8 d/N        4 d/N; 8 d/N
        other                     -          -                   one reduce bucket

    In ZeRO-1 as in 2 DeepSpeed holds after backward the gradients of a rank's own partition; of a parameter cut by the
    border of a partition it holds all of it on both sides, which shows where parameters are few. Offloaded, master,
    moments and (in ZeRO-1/2) the gradients are on the host, see `host_memory`.

    Args:
        setting: the run.

    Returns:
        Category -> bytes.
    """
    n, trained = setting.ranks, setting.total_trained
    found: dict[str, float] = dict.fromkeys(CATEGORIES, 0.0)
    shapes = [rows * columns for rows, columns in setting.shapes]
    if setting.stage == 3:
        shard = setting.share(setting.trained)
        found[WEIGHTS] = LOW * setting.share(shapes)
        found[UNMANAGED] = LOW * setting.unmanaged / n
        found[TRAINED] = LOW * shard
        found[GRADIENTS] = LOW * shard
        found[INDEX] = setting.share(index_sizes(setting))
        found[OTHER] = LOW * setting.bucket
    else:
        shard = trained if setting.stage == 0 else trained // n
        found[WEIGHTS] = LOW * setting.managed
        found[UNMANAGED] = LOW * setting.unmanaged
        found[TRAINED] = LOW * trained
        found[GRADIENTS] = LOW * (trained if setting.stage == 0 else largest_partition(setting)) * (not setting.offload)
        sharded = setting.stage > 0 and setting.placement == "sharded"
        found[INDEX] = setting.share(index_sizes(setting)) if sharded else sum(index_sizes(setting))
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
        adapters, LoRA            -          -                     2 d + 2 d     likewise
        index, sharded            -          2 d + 2/n             2 d + 2/n     all_gather, once, in backward
        θ and index, write-back   -          -                     2 d + the index

    d = 1 in full fine-tuning, whose values are its weights; a replicated index is not gathered. A single rank gathers
    nothing; DeepSpeed reduces all the same. ZeRO-3 in detail:

        - LoRA needs no weight in backward whose input needs no gradient (query, key, value of the first layer).
        - Of the unmanaged parameters all are fetched forward, and backward about half: the head, not the embeddings.
        - Activation checkpointing fetches the weights once more, but for the last product of a layer, which is not
          computed again (LoRA's is, its adapter comes after it), and all of the unmanaged ones twice.
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
            found["all_gather"] = LOW * trained
            if setting.placement == "sharded":
                found["all_gather"] += setting.share(index_sizes(setting)) * n
        return found
    if n == 1:
        return {"reduce_scatter": float(gradients)}
    values, index = LOW * setting.share(setting.trained) * n, setting.share(index_sizes(setting)) * n
    gathered = LOW * _weights_fetched(setting)
    if setting.method == "lora":
        again = 1 + setting.checkpointing
        gathered += (1 + again * (1 - setting.kept / (setting.managed + setting.unmanaged))) * values
    elif setting.method == "lift":
        gathered += values + 2 * index
    return {"all_gather": float(gathered), "reduce_scatter": float(gradients)}


def _weights_fetched(setting: Setting) -> float:
    """Elements of frozen parameters that ZeRO-3 fetches in a step, adapters and θ apart."""
    managed, total = setting.managed, setting.managed + setting.unmanaged
    if not setting.checkpointing:
        first = setting.first_inputs if setting.method == "lora" else 0
        return max(total, 2 * managed + 1.5 * setting.unmanaged - first - setting.kept)
    again = managed - (setting.last_products if setting.method != "lora" else 0)
    if setting.method == "full" and setting.live >= total // setting.layers:
        again = 0
    return max(total, 2 * managed + 2 * setting.unmanaged - setting.kept) + again


def network_refresh(setting: Setting) -> dict[str, float]:
    """Logical bytes that a refresh adds to its step, by kind.

        per managed parameter     ZeRO-1/2                ZeRO-3
        weights to their owner    -                       2             gather
        new index                 the index               the index     broadcast by the owner
        new weights there         -                       2 d           broadcast by the owner
        old index                 -                       the index     all_gather
        old state                 3 * 4 d all_reduce      3 * 4 d       all_gather

    Args:
        setting: a run of LIFT.

    Returns:
        Kind -> bytes; kinds without any are absent. Nothing in ZeRO-0, where every rank selects alike. A single rank
        passes most of this through its collectives too, of which nothing crosses a network.
    """
    if setting.stage == 0:
        return {}
    trained, index = setting.total_trained, sum(index_sizes(setting))
    states = 3.0 * HIGH * trained
    if setting.stage < 3:
        return {"broadcast": float(index), "all_reduce": states}
    gathered = float(setting.share(index_sizes(setting)) * setting.ranks)
    found = {"broadcast": float(index + LOW * trained), "all_gather": states + gathered}
    if setting.ranks > 1:
        found["gather"] = float(LOW * setting.managed)
    return found
