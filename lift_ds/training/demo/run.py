"""What the trainer does when neither a model nor data are named."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from lift_ds.runtime.logs import get_logger
from lift_ds.training.data import instruction_prompt, load_file
from lift_ds.training.demo.base import HELD_OUT_FILE, STORIES_FILE, TRAIN_FILE, BaseSettings, base_folder, ensure_base

logger = get_logger()

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

#: Flag -> the flag above that it says in another way.
_SAID_BY = {
    "density": "budget_rank",
    "num_train_epochs": "max_steps",
    "activation_checkpointing": "gradient_checkpointing",
}

#: Name of the held-out rows of the new task and of the old one, in metric names and in the final table.
NEW, OLD = "problems", "stories"


def settle(values: dict[str, Any], given: Collection[str]) -> str:
    """Name the generated model and data, and set the flags that were not given to what suits the small model.

    Args:
        values: all flags; changed in place.
        given: names of the flags that the user gave.

    Returns:
        One line that says what was set.
    """
    kept = {*given, *(_SAID_BY[name] for name in given if name in _SAID_BY)}
    applied = {name: value for name, value in SETTINGS.items() if name not in kept}
    folder = base_folder(BaseSettings())
    values.update(applied, model_name_or_path=str(folder), train_file=str(folder / TRAIN_FILE), eval_split_size=0.0)
    listed = " ".join(f"--{name} {value}" for name, value in applied.items())
    return f"no model and no data named: a small generated run, as if by {listed} (flags you give stay)"


def prepare() -> None:
    """Build the base model where it is missing: on the first rank of each machine, for which the others wait."""
    logger.info("preparing the small base model (a minute of training where it is not cached)")
    folder = ensure_base(BaseSettings(), build_here=int(os.environ.get("LOCAL_RANK", "0")) <= 0)
    logger.info("base model and data: %s", folder)


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
