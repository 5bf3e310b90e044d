"""A small base model, data files, and one finished run with checkpoints, shared by the files of this folder."""

from __future__ import annotations

import json

import pytest
from launches import CONFIGS, Finished, finish, on_two_ranks
from material import EIGHT_STEPS, Material

from lift_ds.training.demo import texts
from lift_ds.training.demo.base import BaseSettings, build_base


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    folder = tmp_path_factory.mktemp("material")
    small = {"layers": 2, "heads": 4, "intermediate_size": 96, "vocab_size": 400, "steps": 2, "batch_size": 2}
    sizes = {"base": 64, "other_base": 32}
    for name, width in sizes.items():
        (folder / name).mkdir()
        settings = BaseSettings(hidden_size=width, stories=200, problems=40, held_out=4, **small)
        build_base(folder / name, settings)
    rows = texts.problems(64, 5)
    instructions, prompts = folder / "instructions.jsonl", folder / "prompts.json"
    instructions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": row["instruction"] + "\n", "completion": row["output"]} for row in rows]
    prompts.write_text(json.dumps(pairs, indent=1))
    return Material(folder / "base", folder / "other_base", instructions, prompts)


@pytest.fixture(scope="session")
def eight_steps(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run under ZeRO-2 in float32, with its checkpoints."""
    folder = tmp_path_factory.mktemp("eight_steps")
    return finish(on_two_ranks(CONFIGS / "lift_zero2.json", *material.flags(folder / "out", *EIGHT_STEPS)), folder)
