"""Pins down that LIFT trains what is in use: for many architectures of transformers it manages at least 95% of the
entries beside embeddings and head (90% where there is no decoder of language), gradients reach all of that, a refresh
selects again, and the model is a plain one afterwards. The table of docs/architectures.md is what is found here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from pages import REPOSITORY

import lift_ds
from lift_ds.model.attachment import require_attachment

CONFIG = lift_ds.LiftConfig(density=0.05, lra_rank=8, refresh_interval=2)


def row_of(name: str, log: list[str]) -> str:
    """The row of the documentation's table, from the line that LIFT says first."""
    found = re.search(r"LIFT manages (\d+) matrices.*the matrices are ([\d.]+)% of", "\n".join(log))
    assert found is not None
    return f"| `{name}` | {zoo.ARCHITECTURES[name]} | {found[1]} | {found[2]}% |"


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_three_steps_and_a_refresh(name: str, lift_log: list[str], tmp_path: Path) -> None:
    model, batch = zoo.make(name)
    keys = set(model.state_dict())
    lift_ds.attach(model, CONFIG)
    optimizer = lift_ds.LiftAdamW(model, lr=1e-2)
    losses = []
    for _ in range(3):
        torch.manual_seed(1)  # of dropout
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]  # the same batch three times
    assert not [line for line in lift_log if "no gradient" in line or "not managed" in line]
    assert optimizer.driver is not None
    assert [report.matrices for report in optimizer.driver.reports] == [len(require_attachment(model).matrices)]
    assert all(weight.holds_its_values(weight.principal.index.compact()) for weight in weights_of(model))

    row = row_of(name, lift_log)
    assert float(row.split("|")[-2].strip(" %")) >= (95 if "decoder" in row else 90)
    assert row in (REPOSITORY / "docs" / "architectures.md").read_text(encoding="utf-8")

    lift_ds.detach(model)
    assert set(model.state_dict()) == keys
    reloads_as_it_is(model, batch, tmp_path)


def weights_of(model: torch.nn.Module) -> Any:
    return require_attachment(model).weights.values()


def reloads_as_it_is(model: Any, batch: dict[str, torch.Tensor], folder: Path) -> None:
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch).loss, model.eval()(**batch).loss)
