"""The Llamas that benchmarks and the study train: their managed matrices, the LoRA of equal size, the model with random
weights, DeepSpeed's configuration, the engine of each method, and one step of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure.clock import Clock
from benchmarks.measure.records import Record


def matrix_shapes(hidden: int, intermediate: int) -> list[tuple[int, int]]:
    """Return the shapes of the managed matrices of one layer."""
    return [(hidden, hidden)] * 4 + [(intermediate, hidden)] * 2 + [(hidden, intermediate)]


def lora_rank(density: float, hidden: int, intermediate: int) -> int:
    """Return the rank of the LoRA that trains nearest to that share of the managed matrices."""
    shapes = matrix_shapes(hidden, intermediate)
    return max(1, round(density * sum(m * n for m, n in shapes) / sum(m + n for m, n in shapes)))


def llama_config(
    hidden: int,
    intermediate: int,
    layers: int,
    vocabulary: int,
    sequence: int,
    key_value_heads: int | None = None,
    attention: str = "sdpa",
    experts: int = 0,
) -> Any:
    """Return the transformers configuration of a Llama of these sizes, or with experts of a Mixtral.

    Args:
        hidden: h.
        intermediate: i.
        layers: L.
        vocabulary: V.
        sequence: tokens of the longest sequence.
        key_value_heads: heads of keys and values; None for one each of the queries'.
        attention: which of transformers' implementations.
        experts: of each layer, in the place of its feed-forward matrices; a token passes two of them.
    """
    # Not at the top: DeepSpeed, which transformers imports, first wants to be told of the device.
    from transformers import AutoConfig

    mixture = {"num_local_experts": experts, "num_experts_per_tok": 2} if experts else {}
    heads = max(1, hidden // (64 if hidden < 4096 else 128))
    return AutoConfig.for_model(
        "mixtral" if experts else "llama",
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads or heads,
        max_position_embeddings=sequence,
        attn_implementation=attention,
        tie_word_embeddings=False,
        use_cache=False,
        **mixture,
    )


def build_llama(
    hidden: int,
    intermediate: int,
    layers: int,
    vocabulary: int,
    sequence: int,
    device: str = "cpu",
    key_value_heads: int | None = None,
    experts: int = 0,
) -> nn.Module:
    """Build a Llama or a Mixtral in bf16, the same on every rank; the sizes are those of `llama_config`."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    config = llama_config(hidden, intermediate, layers, vocabulary, sequence, key_value_heads, experts=experts)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config).to(torch.bfloat16)


def ds_config(
    stage: int, batch: int, bucket: int, *, clipping: float = 1.0, live: int | None = None, **zero: Any
) -> Record:
    """Return a DeepSpeed configuration in bf16.

    Args:
        stage: of ZeRO.
        batch: sequences of a rank and step.
        bucket: elements of DeepSpeed's buckets.
        clipping: largest norm of the gradients, 0 for any.
        live: parameters that ZeRO-3 may keep gathered; None for DeepSpeed's own thresholds, with which a small model
            stays gathered from forward to backward.
        **zero: further entries of `zero_optimization`.
    """
    zero |= {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if stage == 3 and live is not None:
        zero |= {
            "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0,
            "stage3_max_live_parameters": live, "stage3_max_reuse_distance": live,
        }  # fmt: skip
    return {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_clipping": clipping,
        "steps_per_print": 10**9,
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }


def build_engine(model: Any, method: str, rank: int, config: Record, lift: Record) -> Any:
    """Build DeepSpeed's engine of a method; embeddings, norms and head are frozen in all of them.

    Args:
        model: a Llama.
        method: "full", "lora" or "lift".
        rank: of the LoRA.
        config: content of a DeepSpeed file.
        lift: LIFT's block of it.
    """
    if method != "lift":
        return dense_engine(model, method, rank, config)
    import lift_ds

    return lift_ds.initialize(model=model, config={**config, "lift": lift})[0]


def dense_engine(model: Any, method: str, rank: int, config: Record) -> Any:
    """Build DeepSpeed's engine of what LIFT is compared with, by torch's fused AdamW.

    Args:
        model: a Llama.
        method: "full", over the managed matrices alone, or "lora".
        rank: of the LoRA.
        config: content of a DeepSpeed file.
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
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def step(engine: Any, tokens: Tensor, entering: Callable[[str], object] = lambda phase: None) -> Tensor:
    """Do one optimizer step.

    Args:
        engine: of any method.
        tokens: int64 [sequences, tokens], inputs and labels.
        entering: told of each phase when it begins: "forward", "backward", "step", and "end" after the last.

    Returns:
        The loss, a scalar.
    """
    entering("forward")
    loss = engine(input_ids=tokens, labels=tokens).loss
    entering("backward")
    engine.backward(loss)
    loss = loss.detach()
    entering("step")
    engine.step()
    entering("end")
    return loss


def timed_step(engine: Any, tokens: Tensor) -> tuple[list[float], float]:
    """Do one optimizer step; return the seconds of its forward, backward and step, and the loss."""
    clock = Clock(tokens.device)
    loss = step(engine, tokens, lambda phase: clock.mark())
    return clock.seconds(), loss.item()


def now(device: torch.device) -> float:
    """Return the time in seconds, on a GPU when it is done with everything before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
