"""What the formulas need to know of an architecture, read off the built model.

The formulas (`formulas`, `peak`, `speed`) are those of a decoder of the Llama family. This table is the one place that
says where each of their sizes is read, and what stands in for it where a model has no such thing:

    hidden h         hidden_size of the configuration; else the width of the embeddings
    layers L         entries of the list of layers; of an encoder and a decoder both
    vocabulary V     rows of the output head; else of the embeddings
    intermediate i   of layers with experts what a token passes: moe_intermediate_size, else intermediate_size, times
                     the experts of a token; else intermediate_size of the configuration, where a matrix of a layer has
                     as many inputs; else the most inputs of a matrix with h outputs; else h
    key_value c      outputs of the matrix that makes the keys; of one that makes queries, keys and values at once half
                     of what the queries leave, which are as wide as the input of the attention's other matrix; else
                     the head_dim and num_key_value_heads of the configuration; else h
    heads a          num_attention_heads of the configuration; else 1

`differences` names in what else a model is not as the formulas take it to be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lift_ds.model.weights import WEIGHTS, PrincipalWeight, principal_weights
from lift_ds.planner.formulas import Uses

#: Names of the matrices that make the keys, and of those that make queries, keys and values at once.
_KEYS = ("k_proj", "key", "k", "key_proj", "k_lin", "Wk")
_FUSED = ("c_attn", "query_key_value", "qkv_proj", "qkv", "Wqkv")

#: Classes of the matrices that are layers of their own.
_LINEAR = (nn.Linear, Conv1D)

#: How transformers names the classes of attention and of experts, in part.
_ATTENTION, _EXPERTS = ("Attention", "MLA"), ("Experts",)

#: Classes whose parameters ZeRO-3 fetches as one if nothing else is asked for: DEFAULT_LEAF_MODULE_CLASSES of
#: DeepSpeed 0.19, in `deepspeed.runtime.zero.leaf_module_config`.
LEAVES = ("MixtralSparseMoeBlock", "Qwen2MoeSparseMoeBlock", "Qwen3MoeSparseMoeBlock")


@dataclass(frozen=True)
class Architecture:
    """The sizes of a model that the formulas go by.

    Args:
        hidden: h.
        intermediate: i, of the feed-forward layers.
        key_value: c, width of keys.
        heads: of the queries.
        layers: L.
        vocabulary: V.
        experts: that a token passes in a layer; 0 of a dense model.
        leaves: names of the managed weights that are in a leaf module of ZeRO-3.
        uses: where it uses its weights.
        differences: in what the model is not a decoder of the Llama family.
    """

    hidden: int
    intermediate: int
    key_value: int
    heads: int
    layers: int
    vocabulary: int
    experts: int
    leaves: frozenset[str]
    uses: Uses
    differences: tuple[str, ...]


def read_architecture(settings: Any, model: nn.Module) -> Architecture:
    """Read the sizes of a model.

    Args:
        settings: its transformers configuration.
        model: on any device; LIFT may be attached.
    """
    text = settings.get_text_config(decoder=True)
    stacks = [_layers_of(stack) or _layers_of(model) for stack in _stacks(settings, model)]
    blocks = [block for stack in stacks for block in stack]
    hidden = _size(text, "hidden_size") or _embedding(model).shape[1]
    intermediate = _intermediate(text, blocks, hidden)
    return Architecture(
        hidden=hidden,
        intermediate=intermediate,
        key_value=_key_width(blocks) or _key_width_by(text, hidden),
        heads=_size(text, "num_attention_heads") or 1,
        layers=len(blocks),
        vocabulary=_head(model).shape[0],
        experts=(_experts_of_a_token(text) or 1) if any(_has(block, _EXPERTS) for block in blocks) else 0,
        leaves=frozenset(name for leaf in _leaves(model) for name, _ in principal_weights(leaf)),
        uses=_uses(text, model, blocks, intermediate),
        differences=_differences(model, stacks, hidden, intermediate),
    )


def _size(settings: Any, name: str) -> int | None:
    """Return a size by the configuration, None where it has none; where layers differ that of the first."""
    value = getattr(settings.per_layer_config[0] if settings.is_heterogeneous else settings, name, None)
    return value if isinstance(value, int) and value > 0 else None


def _stacks(settings: Any, model: Any) -> list[nn.Module]:
    """Return the decoder of the language model, or its encoder and its decoder."""
    text = settings.get_text_config()
    # Of a model with other parts than the language model, `get_decoder` returns the whole language model.
    language = model if settings.is_encoder_decoder or text is settings else model.get_decoder()
    decoder = language.get_decoder()
    return [language.get_encoder(), decoder] if text.is_encoder_decoder or settings.is_encoder_decoder else [decoder]


def _layers_of(stack: nn.Module) -> list[nn.Module]:
    """Return the layers of a stack: the longest of the lists of modules that lie nearest to it; none without a list."""
    level = [stack]
    while level:
        lists = [list(module) for module in level if isinstance(module, nn.ModuleList)]
        if lists:
            return max(lists, key=len)
        level = [child for module in level for child in module.children()]
    return []


def _embedding(model: Any) -> Any:
    try:
        return model.get_input_embeddings().weight
    except NotImplementedError:
        raise ValueError(
            f"{type(model).__name__} has no embeddings of tokens; only language models are planned"
        ) from None


def _output(model: Any) -> Any:
    """Return the weight of the output head, which may be that of the embeddings too; None without a head."""
    return getattr(model.get_output_embeddings(), "weight", None)


def _head(model: Any) -> Any:
    head = _output(model)
    return _embedding(model) if head is None else head


def _matrices(block: nn.Module) -> list[tuple[int, int]]:
    """Return the outputs and inputs of each matrix that is a layer of its own."""
    return [_outputs_and_inputs(module) for module in block.modules() if isinstance(module, _LINEAR)]


def _outputs_and_inputs(module: Any) -> tuple[int, int]:
    return (module.nf, module.nx) if isinstance(module, Conv1D) else (module.out_features, module.in_features)


def _intermediate(text: Any, blocks: list[nn.Module], hidden: int) -> int:
    named = _size(text, "intermediate_size")
    found = {inputs for block in blocks for outputs, inputs in _matrices(block) if outputs == hidden}
    if any(_has(block, _EXPERTS) for block in blocks):
        width = _size(text, "moe_intermediate_size") or named
        if width:
            return width * (_experts_of_a_token(text) or 1)
    if named and named in found:  # some classes use another width than their configuration has
        return named
    return max(found, default=hidden)


def _experts_of_a_token(text: Any) -> int | None:
    """Return how many experts a token passes, by the configuration; None where it does not say."""
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "top_k_experts", "moe_topk")
    return next((size for name in names if (size := _size(text, name))), None)


def _key_width(blocks: list[nn.Module]) -> int | None:
    """Return the width of the keys by the first attention whose matrices tell it; None where none does."""
    for block in blocks:
        for module in block.modules():
            own = {
                name: _outputs_and_inputs(child)
                for name, child in module.named_children()
                if isinstance(child, _LINEAR)
            }
            for name, (outputs, _) in own.items():
                if name in _KEYS:
                    return outputs
                if name in _FUSED and len(own) == 2:
                    queries = next(inputs for other, (_, inputs) in own.items() if other != name)
                    return (outputs - queries) // 2
    return None


def _uses(text: Any, model: Any, blocks: list[nn.Module], intermediate: int) -> Uses:
    attentions = [module for block in blocks[:1] for module in block.modules() if _is_named(module, _ATTENTION)]
    # The last matrix of an attention is that of its output; all others see the embeddings.
    inputs = [matrix for found in attentions[:1] for matrix in found.modules() if isinstance(matrix, _LINEAR)][:-1]
    managed = [weight for _, weight in principal_weights(model)]
    head = _output(model)
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    ends = embeddings if head is None else [*embeddings, head]
    return Uses(
        first_inputs=_entries(matrix.weight for matrix in inputs if WEIGHTS in matrix.__dict__),
        early=_entries(parameter for module in _before_training(model) for parameter in module.parameters(False)),
        # What ends a layer comes from the feed-forward width.
        last_products=_entries(
            weight.weight
            for weight in managed
            if isinstance(weight.module, _LINEAR) and _outputs_and_inputs(weight.module)[1] == intermediate
        ),
        ends=_entries(weight for weight in ends if not weight.requires_grad),
        tied=_entries(weight for weight in embeddings if weight is head),
        idle=sum(_idle(weight, _experts_of_a_token(text)) for weight in managed),
        stack=max((weight.elements() for weight in managed if weight.matrices > 1), default=0),
        together=max((_managed_in(module) for module in [*_holders(managed), *_leaves(model)]), default=0),
    )


def _before_training(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules with parameters that come before the first one that trains something, or contains what does."""
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            if any(parameter.requires_grad for parameter in module.parameters()):
                return
            yield module


def _leaves(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__ in LEAVES]


def _holders(managed: list[PrincipalWeight]) -> list[nn.Module]:
    """Return the modules that have several managed weights themselves."""
    count = Counter(weight.module for weight in managed)
    return [module for module, weights in count.items() if weights > 1]


def _managed_in(module: nn.Module) -> int:
    return sum(weight.elements() for _, weight in principal_weights(module))


def _idle(weight: PrincipalWeight, experts_of_a_token: int | None) -> int:
    """Return how many entries of a weight a token does not pass."""
    if weight.matrices == 1 or experts_of_a_token is None or not _is_named(weight.module, _EXPERTS):
        return 0
    return weight.elements() * max(0, weight.matrices - experts_of_a_token) // weight.matrices


def _entries(weights: Iterable[Tensor]) -> int:
    return sum(weight.numel() for weight in weights)


def _key_width_by(text: Any, hidden: int) -> int:
    """Return the width of the keys by the configuration."""
    heads = _size(text, "num_attention_heads")
    if heads is None:
        return hidden
    return (_size(text, "head_dim") or hidden // heads) * (_size(text, "num_key_value_heads") or heads)


def _differences(model: nn.Module, stacks: list[list[nn.Module]], hidden: int, intermediate: int) -> tuple[str, ...]:
    """Say in what a model is not a decoder of the Llama family."""
    blocks = [block for stack in stacks for block in stack]
    found = []
    if len(stacks) > 1:
        found.append("an encoder and a decoder, each counted with the whole sequence")
    plain = sum(not _has(block, _ATTENTION) for block in blocks)
    if plain:
        found.append(f"{plain} of {len(blocks)} layers without attention")
    if any(_has(block, _EXPERTS) for block in blocks):
        found.append("experts")
    elif not any(_is_gated(block, hidden, intermediate) for block in blocks):
        found.append("feed-forward layers without a gate")
    inside = {id(module) for block in blocks for module in block.modules()}
    managed = [weight for _, weight in principal_weights(model)]
    outside = sum(id(weight.module) not in inside for weight in managed)
    if outside:
        found.append(
            f"{outside} of {len(managed)} matrices outside the language model's layers, counted as if every token "
            "passed them"
        )
    return tuple(found)


def _has(block: nn.Module, names: tuple[str, ...]) -> bool:
    """Tell whether a layer has a module whose class is named so."""
    return any(_is_named(module, names) for module in block.modules())


def _is_named(module: nn.Module, names: tuple[str, ...]) -> bool:
    return any(name in type(module).__name__ for name in names)


def _is_gated(block: nn.Module, hidden: int, intermediate: int) -> bool:
    """Tell whether a layer makes two vectors of the intermediate width, by two matrices or by one for both."""
    widths = [outputs for outputs, inputs in _matrices(block) if inputs == hidden and outputs % intermediate == 0]
    return sum(widths) >= 2 * intermediate
