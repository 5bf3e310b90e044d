"""Small models and data shared by the tests: the same on every rank and in the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lift_ds

VOCABULARY = 97
GLOBAL_BATCH = 4
#: Tokens of a sequence.
LENGTH = 16

#: Settings of the parity runs: 60 steps with a refresh every 20.
PARITY = lift_ds.LiftConfig(
    budget_rank=4, lra_rank=4, refresh_interval=20, solver="svd", lr=2e-4, betas=(0.9, 0.95), weight_decay=0.1
)
PARITY_STEPS = 60
#: Numbers of entries that two ranks do not divide, and that do not fill the words of an index.
PARITY_ODD = replace(PARITY, budget_rank=None, density=0.3)


#: The parity runs with each of the other solvers; by so small a tolerance "chebyshev" has to select exactly.
PARITY_SOLVERS = {
    "gram": replace(PARITY, solver="gram"),
    "chebyshev": replace(PARITY, solver="chebyshev", selection_tolerance=1e-4),
}
#: The parity runs by other criteria, each at the stages where it is tried.
PARITY_CRITERIA = {"random": (2, 3), "magnitude": (2,), "smallest": (3,), "gradient": (2, 3)}
#: Variants of the parity run that the slow tests run.
PARITY_SLOW = {
    "gram stage 2", "gram stage 3", "random stage 2", "gradient stage 2", "bf16 stage 0", "bf16 stage 1 fp32 gradients",
}  # fmt: skip
#: Blocks of entries, refreshed in turns.
PARITY_BLOCKS = replace(PARITY, block_shape=(2, 4), refresh_parts=3)


def parity_runs(ranks: int) -> list[tuple[str, int]]:
    """The models and ZeRO stages that are compared with the reference; on four ranks, on two cores, only some."""
    stages = {"llama": [2, 3], "matrices": [3]} if ranks == 4 else {"llama": range(4), "matrices": range(4)}
    return [(kind, stage) for kind in stages for stage in stages[kind]]


def small_llama(dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    """A Llama of two layers with the same weights at every call."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "attn_implementation": "sdpa",
    }
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).to(dtype)


#: Small mixtures of experts, each with another way to compute its experts: what the matrices are and how they are read.
EXPERTS = {"mixtral": "eager", "qwen3_moe": "batched_mm", "gpt_oss": "grouped_mm"}


def small_experts(kind: str, implementation: str | None = None, experts: int = 4) -> nn.Module:
    """A mixture of experts of two layers with the same weights at every call."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_experts_per_tok": 2,
    }  # fmt: skip
    own: dict[str, Any] = {
        "mixtral": {"num_local_experts": experts},
        "qwen3_moe": {
            "num_experts": experts,
            "moe_intermediate_size": 24,
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
        },
        "gpt_oss": {
            "num_local_experts": experts,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    }[kind]
    torch.manual_seed(4)
    settings = AutoConfig.for_model(kind, **sizes, **own)
    model = AutoModelForCausalLM.from_config(settings, experts_implementation=implementation or EXPERTS[kind])
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            nn.init.normal_(parameter, std=0.2)  # as small as transformers draws them, nothing would depend on them
    return model


def token_batch(step: int) -> Tensor:
    """Token ids [GLOBAL_BATCH, LENGTH] of one step; every rank takes its rows."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(0, VOCABULARY, (GLOBAL_BATCH, LENGTH), generator=generator)


class Matrices(nn.Module):
    """Four independent linear layers: tall, wide, square, and one small enough that k = m * n."""

    SHAPES: ClassVar = {"tall": (48, 12), "wide": (10, 60), "square": (32, 32), "whole": (8, 8)}

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        for name, (rows, columns) in self.SHAPES.items():
            layer = nn.Linear(columns, rows, bias=False)
            layer.weight.data = torch.randn(rows, columns, generator=generator) / columns**0.5
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        """Sum over the layers of the mean squared distance from a fixed target; x [batch, 60]."""
        losses = []
        for name, (rows, columns) in self.SHAPES.items():
            y = self.get_submodule(name)(x[:, :columns])
            losses.append((y - torch.sin(x[:, :rows] * 3)).square().mean())
        return torch.stack(losses).sum()


def matrix_batch(step: int) -> Tensor:
    """Inputs [GLOBAL_BATCH, 60] of one step."""
    generator = torch.Generator().manual_seed(2000 + step)
    return torch.randn(GLOBAL_BATCH, 60, generator=generator)


def gradient_batches() -> list[dict[str, Tensor]]:
    """What the criterion "gradient" measures on, in the runs of "llama"."""
    return [{"input_ids": tokens, "labels": tokens} for tokens in (token_batch(90), token_batch(91))]


@torch.enable_grad()
def mean_gradients(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mean |dL/dW| on these batches by torch alone, of a plain model whose weights these are."""
    totals = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for batch in gradient_batches():
        found = torch.autograd.grad(model(**batch).loss, list(weights.values()))
        for name, gradient in zip(weights, found, strict=True):
            totals[name] += gradient.abs() / len(gradient_batches())
    return totals


def loss_of(model: nn.Module, kind: str, step: int, rows: slice = slice(None)) -> Tensor:
    """The loss of a "llama" or "matrices" model on the rows of one step's batch."""
    if kind == "matrices":
        return model(matrix_batch(step)[rows])
    tokens = token_batch(step)[rows]
    return model(input_ids=tokens, labels=tokens).loss


def build(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A "llama" or "matrices" model with the same weights at every call."""
    if kind in EXPERTS:
        return small_experts(kind).to(dtype)
    return Matrices() if kind == "matrices" else small_llama(dtype)


def experts_runs(ranks: int, every: bool) -> list[tuple[str, int]]:
    """The mixtures of experts and ZeRO stages that are compared with the reference.

    Args:
        ranks: how many.
        every: whether all are, which takes two minutes; else each kind and each stage once, about.
    """
    if every:
        return [(kind, stage) for kind in EXPERTS for stage in range(4)]
    few = {1: [("gpt_oss", 0), ("qwen3_moe", 3)], 2: [("mixtral", 1), ("mixtral", 2), ("mixtral", 3), ("gpt_oss", 3)]}
    return few[ranks]


def managed_stacks(model: nn.Module) -> dict[str, Tensor]:
    """Name -> parameter, of the weights that LIFT manages in a mixture of experts, written out independently of it."""
    linear, stacks = "_proj.weight", (".experts.gate_up_proj", ".experts.down_proj")
    found = [(name, p) for name, p in model.named_parameters() if name.endswith((linear, *stacks))]
    return {name.removesuffix(".weight"): parameter for name, parameter in found}


def managed_weights(model: nn.Module, kind: str) -> dict[str, Tensor]:
    """Name of the layer -> weight, of the layers LIFT manages by default, written out independently of it."""
    if kind == "matrices":
        return {name: model.get_submodule(name).weight for name in Matrices.SHAPES}
    return {
        name.removesuffix(".weight"): parameter
        for name, parameter in model.named_parameters()
        if name.endswith("_proj.weight")
    }
