"""Reads saved models as anybody would, and compares them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


def load(folder: Path) -> PreTrainedModel:
    """Load a model in the dtype it was saved in; no key may be missing, left over or of another shape."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def load_like(folder: Path, base: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Load a trained model and its base; check that keys, shapes, dtypes agree. Their states, the trained one first."""
    after, before = load(folder).state_dict(), load(base).state_dict()
    assert {name: (t.shape, t.dtype) for name, t in after.items()} == {
        name: (t.shape, t.dtype) for name, t in before.items()
    }
    assert all(torch.isfinite(t).all() for t in after.values())
    return after, before


def generate(folder: Path, prompt: str) -> str:
    """Let a saved model continue a prompt with its saved tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(prompt, return_tensors="pt")
    output = load(folder).generate(**tokens, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(output[0, tokens["input_ids"].shape[1] :])


def is_managed(name: str) -> bool:
    """Tell whether LIFT trains the tensor of that name in a Llama, where nothing else is said."""
    return name.endswith("_proj.weight")
