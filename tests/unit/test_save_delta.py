"""Pins `--save_delta`: it is refused before training where a delta could not be written or would hold the whole model,
and after training it says what it wrote, or why it did not; the model that is saved by then stays. That a run writes it
is pinned in tests/end_to_end/test_main_job.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from saved_models import altered, contents, model_in, perturb, same_files

from lift_ds.delta import apply_deltas
from lift_ds.training import delta
from lift_ds.training.loading import Base


@pytest.mark.parametrize(
    ("stored", "held", "allowed"),
    [
        (torch.float32, torch.float32, True),
        (torch.bfloat16, torch.bfloat16, True),
        (torch.bfloat16, torch.float32, True),  # and rounded back to what it was, where nothing changed
        (torch.float32, torch.bfloat16, False),
        (torch.float16, torch.bfloat16, False),
        (torch.bfloat16, torch.float16, False),
    ],
)
def test_training_that_rounds_every_weight_is_refused(
    stored: torch.dtype, held: torch.dtype, allowed: bool, tmp_path: Path
) -> None:
    base = model_in(tmp_path / "base", stored)
    if allowed:
        delta.check(str(base), Base(stored, True), held)
    else:
        with pytest.raises(ValueError, match=f"stored in {stored} and would be trained in {held}, which rounds"):
            delta.check(str(base), Base(stored, True), held)


def test_a_base_without_safetensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has neither model.safetensors nor"):
        delta.check(str(tmp_path), Base(torch.float32, True), torch.float32)


def test_what_is_written_is_said_and_what_is_not_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lift_log: list[str]
) -> None:
    base = model_in(tmp_path / "base")
    tuned = altered(base, tmp_path / "tuned", perturb)
    delta.save(str(base), str(tuned))
    assert f"{tuned / 'delta.safetensors'}: " in capsys.readouterr().out
    again = apply_deltas(str(base), [tuned / "delta.safetensors"], tmp_path / "again")
    assert same_files(contents(again), contents(tuned))
    assert not lift_log
    other = altered(base, tmp_path / "other", lambda file: [tensor.resize_(1) for tensor in file.values()])
    delta.save(str(base), str(other))
    (line,) = lift_log
    assert line.startswith("WARNING --save_delta true: no delta was written: lm_head.weight has the shape [1] in ")
    assert not (other / "delta.safetensors").exists()
