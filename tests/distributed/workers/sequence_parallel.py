"""Sequence parallelism of DeepSpeed (Ulysses): two ranks, each with half of every sequence."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import cases
import engines
import torch
import torch.distributed as dist
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from torch import Tensor
from torch.distributed.nn.functional import all_gather

import lift_ds

#: A refresh after step 4 of 8.
SETTINGS = replace(cases.PARITY, refresh_interval=4)
STEPS = 8


def loss_of(engine: Any, step: int) -> Tensor:
    """The loss of all rows of a step: the mean over the tokens of all ranks, as transformers' Trainer computes it."""
    tokens = cases.token_batch(step)
    half = tokens.shape[1] // 2
    own = slice(dist.get_rank() * half, (dist.get_rank() + 1) * half)
    labels = torch.nn.functional.pad(tokens, (0, 1), value=-100)[:, 1:]
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    batch = {
        "input_ids": tokens[:, own],
        "position_ids": positions[:, own],
        "shift_labels": labels[:, own].contiguous(),
    }
    loss = engine(**batch, labels=batch["shift_labels"]).loss
    counted = torch.stack(all_gather((batch["shift_labels"] != -100).sum()))
    return (torch.stack(all_gather(loss)) * counted).sum() / counted.sum()


def run(stage: int, mpu: Any, **options: Any) -> dict[str, Any]:
    """Train with halves of sequences."""
    config = engines.ds_config(stage) | options | {"train_micro_batch_size_per_gpu": cases.GLOBAL_BATCH}
    model = cases.build("llama")
    engine = lift_ds.initialize(model=model, config={**config, "lift": SETTINGS.to_dict()}, mpu=mpu)[0]
    losses = []
    for step in range(STEPS):
        loss = loss_of(engine, step)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    found = {"losses": losses, "weights": engines.whole_weights(model), "indices": engines.whole_indices(model)}
    engine.destroy()
    return found


if __name__ == "__main__":
    engines.start()
    mpu = UlyssesSPAttentionHF.register_with_transformers(cases.build("llama"), "sdpa", 2, cases.GLOBAL_BATCH)
    results = {f"stage {stage}": run(stage, mpu) for stage in (2, 3)}
    results["rounded messages"] = run(3, mpu, seq_parallel_communication_data_type="bf16")
    engines.finish(sys.argv[1], results)
