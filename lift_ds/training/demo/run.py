"""How launch/train.py runs when neither a model nor data are named."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from lift_ds.training.data import instruction_prompt, load_file
from lift_ds.training.demo.base import HELD_OUT_FILE, STORIES_FILE, TRAIN_FILE, BaseSettings, ensure_base

#: Flags for a model 192 wide that trains for about a minute; the defaults are for models of billions.
SETTINGS: dict[str, Any] = {
    "budget_rank": 16,
    "lra_rank": 32,
    "refresh_interval": 30,
    "lora_rank": 16,
    "learning_rate": 2e-3,
    "max_steps": 120,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 32,
    "gradient_checkpointing": False,
    "logging_steps": 10,
    "save_strategy": "no",
}

#: Name of the held-out rows of the new task and of the old one, in metric names and in the final table.
NEW, OLD = "problems", "stories"


def settle(values: dict[str, Any], given: Collection[str]) -> str:
    """Set the flags that were not given to what suits the small model.

    Args:
        values: all flags; changed in place.
        given: names of the flags that the user gave.

    Returns:
        One line that says what was set.
    """
    blocked = set(given)
    if "density" in given:  # the other way to say the same thing
        blocked.add("budget_rank")
    if "num_train_epochs" in given:
        blocked.add("max_steps")
    if "activation_checkpointing" in given:
        blocked.add("gradient_checkpointing")
    applied = {name: value for name, value in SETTINGS.items() if name not in blocked}
    values.update(applied)
    listed = " ".join(f"--{name} {value}" for name, value in applied.items())
    return f"no model and no data named: a small generated run, as if by {listed} (flags you give stay)"


def prepare() -> Path:
    """Return the folder of the base model, building it on the first rank of each machine where it is missing."""
    return ensure_base(BaseSettings(), build_here=int(os.environ.get("LOCAL_RANK", "0")) <= 0)


def train_file(folder: Path) -> str:
    """Return the path of the word problems to train on, in the layout of real instruction data."""
    return str(folder / TRAIN_FILE)


def held_out(folder: Path) -> dict[str, Dataset]:
    """Load what shows what was learned and what was kept.

    Args:
        folder: of the base model.

    Returns:
        Held-out problems, and held-out stories of the kind the base was trained on.
    """
    return {NEW: load_file(folder / HELD_OUT_FILE), OLD: load_file(folder / STORIES_FILE)}


@torch.no_grad()
def answer_one(model_folder: str, base: Path) -> str:
    """Load the saved model as anybody would, and let it solve a held-out problem.

    Args:
        model_folder: where the trained model was saved.
        base: folder of the base model, with the problems.

    Returns:
        The problem and the model's answer.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    row = json.loads((base / HELD_OUT_FILE).read_text(encoding="utf-8"))[0]
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    prompt = tokenizer(instruction_prompt(row["instruction"], row["input"]), return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=64, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    return f"asked:    {row['instruction']}\nanswered: {answer}\nexpected: {row['output']}"
