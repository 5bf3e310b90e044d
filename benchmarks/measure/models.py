"""The Llamas that benchmarks and studies train: their managed matrices, the LoRA of equal size, the model with random
weights, and the engine of each method."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def matrix_shapes(hidden: int, intermediate: int) -> list[tuple[int, int]]:
    """Return the shapes of the managed matrices of one layer."""
    return [(hidden, hidden)] * 4 + [(intermediate, hidden)] * 2 + [(hidden, intermediate)]


def lora_rank(density: float, hidden: int, intermediate: int) -> int:
    """Return the rank of the LoRA that trains nearest to that share of the managed matrices."""
    shapes = matrix_shapes(hidden, intermediate)
    return max(1, round(density * sum(m * n for m, n in shapes) / sum(m + n for m, n in shapes)))


def llama_config(hidden: int, intermediate: int, layers: int, vocabulary: int, sequence: int) -> Any:
    """Return the transformers configuration of a Llama of these sizes."""
    # Not at the top: DeepSpeed, which transformers imports, first wants to be told of the device.
    from transformers import LlamaConfig

    heads = max(1, hidden // (64 if hidden < 4096 else 128))
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=sequence,
        attn_implementation="sdpa",
        tie_word_embeddings=False,
        use_cache=False,
    )


def build_llama(
    hidden: int, intermediate: int, layers: int, vocabulary: int, sequence: int, device: str = "cpu"
) -> nn.Module:
    """Build a Llama in bf16, the same on every rank."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(1)
    with torch.device(device):
        return LlamaForCausalLM(llama_config(hidden, intermediate, layers, vocabulary, sequence)).to(torch.bfloat16)


def build_engine(model: Any, method: str, rank: int, ds_config: dict[str, Any], lift: dict[str, Any]) -> Any:
    """Build DeepSpeed's engine of a method; embeddings, norms and head are frozen in all of them.

    Args:
        model: a Llama.
        method: "full", "lora" or "lift".
        rank: of the LoRA.
        ds_config: content of a DeepSpeed file.
        lift: LIFT's block of it.
    """
    if method != "lift":
        return dense_engine(model, method, rank, ds_config)
    import lift_ds

    return lift_ds.initialize(model=model, config={**ds_config, "lift": lift})[0]


def dense_engine(model: Any, method: str, rank: int, ds_config: dict[str, Any]) -> Any:
    """Build DeepSpeed's engine of what LIFT is compared with, by torch's fused AdamW.

    Args:
        model: a Llama.
        method: "full", over the managed matrices alone, or "lora".
        rank: of the LoRA.
        ds_config: content of a DeepSpeed file.
    """
    import deepspeed
    from peft import LoraConfig, get_peft_model

    if method == "lora":
        model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("_proj.weight"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)[0]
