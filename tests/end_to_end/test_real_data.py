"""A named model and data files: every stage and method ends in a plain model with the keys of its base.

Six steps each; what they learn is not looked at, what is saved is. In bf16 the base's float32 weights are rounded
on the way in, so there a frozen weight equals the rounded one to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from launches import CONFIGS, finish, on_two_ranks
from material import Material
from saved import generate, is_managed, load_like

BUDGET_RANK = 4

#: Each combines what a user may combine: stage, precision, checkpointing, accumulation, layout of the rows, packing.
LIFT_RUNS = {
    "lift_zero3": ("--bf16", "--gradient_checkpointing", True, "--gradient_accumulation_steps", 2),
    "lift_zero2_offload": ("--packing", "--packing_strategy", "wrapped", "--max_length", 64),
}
SLOW_LIFT_RUNS = {
    "lift_zero1": ("--bf16", "--gradient_accumulation_steps", 2),
    "lift_zero3_offload": ("--gradient_checkpointing", True),
}
#: The rest repeats what the first two cover, on another stage; each is a launch.
PARAMETERS = [*LIFT_RUNS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_LIFT_RUNS)]


@pytest.mark.parametrize("config", PARAMETERS)
def test_lift_changes_selected_entries_alone(config: str, material: Material, tmp_path: Path) -> None:
    more: Sequence[object] = {**LIFT_RUNS, **SLOW_LIFT_RUNS}[config]
    rows = material.prompts if "offload" in config else material.instructions
    flags = material.flags(tmp_path / "out", "--train_file", rows, *more)
    ended = finish(on_two_ranks(CONFIGS / f"{config}.json", *flags), tmp_path)
    after, before = load_like(ended.output, material.base)
    assert [step for step, _ in ended.refreshes()] == [3, 6]
    assert "held-out rows" in ended.stdout
    assert ended.text.count("evaluating 4 held-out rows before the first step") == 1
    assert ended.text.count("evaluating the same rows after the last step") == 1
    if "--bf16" in more:
        before = {name: tensor.bfloat16().to(tensor.dtype) for name, tensor in before.items()}
    for name, was in before.items():
        changed = int((after[name] != was).sum())
        most = 2 * BUDGET_RANK * sum(was.shape) if is_managed(name) else 0
        assert (0 < changed <= most) if most else changed == 0, name
    generate(ended.output, "Tom has")


@pytest.mark.slow
@pytest.mark.parametrize(("method", "config"), [("lora", "lift_zero3"), ("full", "lift_zero2")])
def test_other_methods_save_plain_models_too(method: str, config: str, material: Material, tmp_path: Path) -> None:
    flags = material.flags(tmp_path / "out", "--method", method, "--lora_rank", 4)
    ended = finish(on_two_ranks(CONFIGS / f"{config}.json", *flags), tmp_path)
    after, before = load_like(ended.output, material.base)
    assert "LIFT" not in ended.text
    for name, was in before.items():
        assert (method == "full" or is_managed(name)) != torch.equal(after[name], was), name
    assert not list(ended.output.glob("adapter*"))
