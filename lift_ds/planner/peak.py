"""What a step takes in memory beside what is held all the time, moment by moment; the peak is the largest of them.

Symbols as in `formulas`; t tokens of a micro-batch on a rank, h hidden size, i width of the feed-forward layer, c width
of keys (and of values), a heads, V vocabulary, L layers. The model is a decoder of the Llama family in transformers:
RMSNorm in fp32, rotary embeddings, attention that does not store its scores, gated feed-forward, frozen embeddings.
`architecture` has the sizes by which any other model is taken for one.
`benchmarks/footprint.py` counts each moment in real runs, with and without activation checkpointing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lift_ds.planner.formulas import GRADIENTS, HIGH, LOW, WORD, Setting, in_leaves, persistent, whole_index
from lift_ds.refresh.store import write_back_batches

#: Elements that ZeRO-3 updates at a time, by DeepSpeed's default.
SUB_GROUP = 10**9

#: Moments of a step.
FORWARD, FIRST_BACKWARD, LAST_BACKWARD, STEP = "loss", "backward, last layer", "backward, first layer", "step"


@dataclass(frozen=True)
class Activations:
    """The sizes that activations depend on.

    Args:
        tokens: t.
        hidden: h.
        intermediate: i.
        key_value: c.
        heads: a.
        layers: L.
        vocabulary: V.
        checkpointing: whether a layer's activations are computed again in its backward.
        accumulation: micro-batches of a step.
        adapters: entries that LoRA's adapters yield in between, per token and layer.
        experts: that a token passes in a layer; 0 of a dense model.
    """

    tokens: int
    hidden: int
    intermediate: int
    key_value: int
    heads: int
    layers: int
    vocabulary: int
    checkpointing: bool
    accumulation: int = 1
    adapters: int = 0
    experts: int = 0


def saved_by_layer(work: Activations) -> int:
    """Bytes that one layer keeps for its backward.

    2 norms           input in fp32, 1/rms, what goes into the products        2 (4 h + 4 + 2 h)
    attention         q, its result; k, v; log-sum-exp of each head            2 h + 2 h + 2 c + 2 c + 4 a
    feed-forward      gate, silu(gate), up, their product                      4 * 2 i
    experts           the rows of their tokens, and what they make of them     2 h + 2 h, for each one of a token
    LoRA              what the first adapter of each pair yields               2 bytes each
    """
    norms = 2 * (4 * work.hidden + 4 + 2 * work.hidden)
    attention = 4 * work.hidden + 4 * work.key_value + 4 * work.heads
    feed_forward = 8 * work.intermediate + 4 * work.experts * work.hidden
    return work.tokens * (norms + attention + feed_forward + LOW * work.adapters)


def saved_by_model(work: Activations) -> int:
    """Bytes kept at the end of forward: of each layer all, or with checkpointing its input alone, 2 h a token."""
    return work.layers * (LOW * work.tokens * work.hidden if work.checkpointing else saved_by_layer(work))


def moments(setting: Setting, work: Activations) -> dict[str, float]:
    """Bytes on a rank at each moment of a step beside what is held between steps.

        loss                    saved by the model; softmax, its gradient and the logits' in fp32, 3 * 4 V t, or the
                                last norm's backward, 5 * 4 h t; or in forward 6 i + 4 h a token within a layer,
                                LoRA 8 i + 4 h
        backward, last layer    saved by the model; with checkpointing that layer's once more; 2 (2 h + i) a token in
                                flight; one dW or its tile; two reduce buckets, in ZeRO-3 at most one; there also
                                the weights it keeps or fetches: a matrix, with checkpointing a layer; and where it
                                fetches several at once their buffer, before there is a dW
        backward, first layer   what one layer saves, and the same; all gradients; the whole index in ZeRO-1/2
        step                    K/N gradients: as they are, joined (ZeRO-1, 2) and in fp32, 2 + 2 + 4; the whole index;
                                or in ZeRO-3 what LIFT writes back at a time, θ and the index of some matrices

    With several micro-batches the gradients are there at every moment. In ZeRO-1 they are whole until the step. In
    ZeRO-3 they are among what is held. Offloaded, the step takes place on the host.

    Args:
        setting: the run.
        work: its activations.

    Returns:
        Moment -> bytes, in the order of the step.
    """
    partitioned = setting.stage == 3
    gradients = 0.0 if partitioned else _gradients_in_backward(setting)
    whole_index = 0.0 if partitioned else _gathered_index(setting)
    others = partitioned and setting.ranks > 1  # a single rank has all weights anyway
    kept_weights = LOW * setting.kept * others
    fetched = setting.managed / work.layers if work.checkpointing else max(m * n for m, n in setting.shapes)
    together = _fetched_together(setting) * others
    gathered = max(kept_weights, LOW * fetched * others, together)
    in_flight = LOW * work.tokens * (2 * work.hidden + work.intermediate)
    layer = saved_by_layer(work)
    kept = gradients if work.accumulation > 1 else 0.0
    own = layer if work.checkpointing else 0
    buckets = 2 * LOW * setting.bucket * (setting.stage > 0)
    if partitioned:  # which holds one all the time; beside it gradients wait to be reduced
        buckets = LOW * min(setting.bucket, setting.total_trained)
    at_layer = in_flight + max(_weight_gradient(setting), together) + buckets + gathered
    head = work.tokens * max(3 * HIGH * work.vocabulary, 5 * HIGH * work.hidden)
    forward = work.tokens * ((6 + LOW * bool(work.adapters)) * work.intermediate + 4 * work.hidden)
    return {
        FORWARD: saved_by_model(work) + max(head, forward * work.checkpointing) + kept + kept_weights,
        FIRST_BACKWARD: saved_by_model(work) + own + at_layer + kept,
        LAST_BACKWARD: layer + at_layer + gradients + whole_index,
        STEP: _step(setting) + whole_index,
    }


def _gradients_in_backward(setting: Setting) -> float:
    """Bytes of gradients at the end of backward, ZeRO 0 to 2."""
    if setting.offload:
        return 0.0
    return float(LOW * setting.total_trained) if setting.stage < 2 else persistent(setting)[GRADIENTS]


def _gathered_index(setting: Setting) -> float:
    """Bytes of the whole index beside this rank's part of it, from backward to the write-back in ZeRO 1 and 2."""
    if setting.stage == 0 or setting.ranks == 1 or setting.placement == "replicated":
        return 0.0
    return float(whole_index(setting))


def _fetched_together(setting: Setting) -> float:
    """Bytes of the weights that ZeRO-3 fetches at once, with θ and the index where they are in a leaf module."""
    values, words = in_leaves(setting)
    return LOW * setting.uses.together + (LOW * sum(values) + WORD * sum(words)) / setting.layers


def _weight_gradient(setting: Setting) -> float:
    """Bytes of the largest gradient of a weight that is formed: LoRA none, LIFT tiles of matrices and whole stacks."""
    largest = max(rows * columns for rows, columns in setting.shapes)
    formed = {"full": largest, "lora": 0, "lift": max(min(largest, setting.tile), setting.uses.stack)}[setting.method]
    return float(LOW * max([formed, *map(math.prod, setting.dense)]))


def _step(setting: Setting) -> float:
    if setting.offload:
        return 0.0
    shard = setting.total_trained / (setting.ranks if setting.stage else 1)
    if setting.stage == 3:  # updates a sub-group at a time
        return max((LOW + HIGH) * min(shard, SUB_GROUP), _written_at_a_time(setting))
    return (LOW + HIGH + LOW * (setting.stage > 0)) * shard


def _written_at_a_time(setting: Setting) -> float:
    """Bytes of θ and index that LIFT's write-back gathers together in ZeRO-3, at most."""
    if setting.method != "lift":
        return 0.0
    sizes = [LOW * k + WORD * words for k, words in zip(setting.trained, setting.index_words, strict=True)]
    return float(max(sum(sizes[batch]) for batch in write_back_batches(setting.trained)))


def in_all(setting: Setting, work: Activations) -> dict[str, float]:
    """Return `moments` with what is held between steps."""
    between = persistent(setting)
    base = sum(between.values()) - (0.0 if setting.stage == 3 else between[GRADIENTS])
    return {moment: base + size for moment, size in moments(setting, work).items()}


def peak(setting: Setting, work: Activations) -> tuple[str, float]:
    """Return the moment at which a rank holds most in a step without a refresh, and how many bytes that is in all."""
    found = in_all(setting, work)
    worst = max(found, key=lambda moment: found[moment])
    return worst, found[worst]


def host_memory(setting: Setting) -> float:
    """Bytes on the host for each rank where the optimizer is offloaded: gradients in fp32, master values, moments.

    DeepSpeed's ZeRO-Offload (arXiv 2101.06840) keeps the three of Adam there; ZeRO-2 converts the gradients to fp32 as
    they arrive.
    """
    return 4.0 * HIGH * setting.total_trained / setting.ranks if setting.offload else 0.0
