"""Pins that the documented recipe for a plain loop over accelerate trains the same model by `python`, by `torchrun` on
two ranks, and by `accelerate launch` with a DeepSpeed file of ZeRO 2 and 3, with two refreshes on the way.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from launches import BIN, finish
from pages import blocks
from safetensors.torch import load_file

from lift_ds.runtime.ports import free_port

pytestmark = pytest.mark.slow

ACCELERATE = (
    *(str(BIN / "accelerate"), "launch", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
)

BEFORE = """
import os, sys
import accelerate
sys.path.insert(0, {tests!r})
if "LOCAL_RANK" in os.environ:
    accelerate.PartialState(cpu=True)
import cases, lift_ds
MODEL, BATCH = sys.argv[1], int(sys.argv[2])
rows = [{{"input_ids": row, "labels": row}} for step in range(8) for row in cases.token_batch(step)]
config = lift_ds.LiftConfig(budget_rank=2, lra_rank=2, refresh_interval=3, solver="svd", eps=1e-6)
"""

AFTER = """
if accelerator.is_main_process:
    print("refreshed at", [report.step for report in lift_ds.refreshes(model)])
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of the documentation between data and a model of a few seconds."""
    recipe = next(block.text for block in blocks("python") if block.name == "accelerate")
    path = tmp_path_factory.mktemp("accelerate") / "recipe.py"
    path.write_text(BEFORE.format(tests=str(Path(__file__).parents[1])) + recipe + AFTER)
    return path


@pytest.fixture(scope="module")
def base(script: Path) -> Path:
    import cases

    cases.small_llama().save_pretrained(script.parent / "base")
    return script.parent / "base"


def trained(command: list[str], folder: Path, base: Path, script: Path, batch: int) -> dict[str, torch.Tensor]:
    """Run the recipe; the saved weights."""
    run = f"import os, runpy, sys; os.chdir({str(folder)!r}); runpy.run_path({str(script)!r}, run_name='__main__')"
    (folder / "run.py").write_text(run)
    ended = finish(
        [*command, str(folder / "run.py"), str(base), str(batch)], folder, LOCAL_SIZE="2", HF_HUB_OFFLINE="1"
    )
    assert "refreshed at [3, 6]" in ended.stdout, ended.stdout
    return load_file(folder / "tuned" / "model.safetensors")


@pytest.fixture(scope="module")
def alone(base: Path, script: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return trained([sys.executable], tmp_path_factory.mktemp("alone"), base, script, 4)


@pytest.mark.parametrize("stage", [None, 2, 3])
def test_two_ranks_train_what_one_does(
    stage: int | None, alone: dict[str, torch.Tensor], base: Path, script: Path, tmp_path: Path
) -> None:
    command = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", str(free_port())]
    if stage is not None:
        content = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": stage == 3},
        }
        (tmp_path / "ds.json").write_text(json.dumps(content))
        command = [*ACCELERATE, "--use_deepspeed", "--deepspeed_config_file", str(tmp_path / "ds.json")]
    found = trained(command, tmp_path, base, script, 2)
    assert found.keys() == alone.keys()
    for name, weight in alone.items():
        assert (found[name] - weight).norm() <= 1e-6 * weight.norm(), name
    start = load_file(base / "model.safetensors")
    assert any((found[name] != weight).any() for name, weight in start.items())
