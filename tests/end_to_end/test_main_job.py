"""`deepspeed launch/train.py` with nothing named: builds its base, tunes it with LIFT, and saves a plain model.

One launch with an empty cache, looked at from all sides. The log is pinned because it is how a user knows that
LIFT is active; the weights because a step may change no weight outside the principal set, to the bit.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from launches import CONFIGS, Finished, finish, on_two_ranks
from safetensors import safe_open
from safetensors.torch import load_file
from saved import generate, is_managed, load_like
from torch import Tensor
from transformers import AutoConfig

from lift_ds.delta import apply_deltas, headline, inspect_delta
from lift_ds.training.data import instruction_prompt

#: What launch/train.py sets for the generated run.
BUDGET_RANK, LRA_RANK, INTERVAL, STEPS = 16, 32, 30, 120


@dataclass(frozen=True)
class BareRun:
    """The launch, and the weights after and before it."""

    ended: Finished
    base: Path
    after: dict[str, Tensor]
    before: dict[str, Tensor]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> BareRun:
    folder = tmp_path_factory.mktemp("bare")
    flags = ("--output_dir", folder / "out", "--save_delta", "true")
    command = on_two_ranks(CONFIGS / "lift_zero2.json", *flags)
    ended = finish(command, folder, limit=540, LIFT_DS_CACHE=str(folder / "cache"))
    (base,) = (folder / "cache").iterdir()
    return BareRun(ended, base, *load_like(ended.output, base))


def table_row(text: str, name: str) -> tuple[float, float]:
    """Return the loss before and after of one row of the final table."""
    (row,) = re.findall(rf"^{re.escape(name)}\s+([\d.]+)\s+([\d.]+)\s+[-+][\d.]+%$", text, re.MULTILINE)
    return float(row[0]), float(row[1])


def test_the_new_task_is_learned_and_the_old_one_reported(bare: BareRun) -> None:
    before, after = table_row(bare.ended.stdout, "word problems (new task)")
    assert after < before * 2 / 3
    known, kept = table_row(bare.ended.stdout, "stories (what it knew)")
    assert known < before, "the base was trained on stories"
    assert kept < before


def test_log_says_what_is_trained_and_every_refresh_once(bare: BareRun) -> None:
    entries = sum(BUDGET_RANK * sum(t.shape) for name, t in bare.before.items() if is_managed(name))
    matrices = sum(map(is_managed, bare.before))
    (start,) = re.findall(r"LIFT manages (\d+) matrices, ([\d,]+) of ", bare.ended.text)
    assert (int(start[0]), int(start[1].replace(",", ""))) == (matrices, entries)
    assert [step for step, _ in bare.ended.refreshes()] == list(range(INTERVAL, STEPS + 1, INTERVAL))
    assert all(0 < churn < 1 for _, churn in bare.ended.refreshes())


def test_progress_is_shown(bare: BareRun) -> None:
    assert f"{STEPS}/{STEPS} [" in bare.ended.stderr
    logs = re.findall(r"^\{'loss': .*\}", bare.ended.stdout.replace("\r", "\n"), re.MULTILINE)
    assert len(logs) == STEPS // 10, "one line a log, over both ranks"
    for log in logs:
        assert re.search(r"'learning_rate': '?[\d.e-]+", log)
        assert re.search(r"'tokens_per_second': '?[\d.e+]+", log)
    assert "Traceback" not in bare.ended.text


def test_saved_model_generates(bare: BareRun) -> None:
    assert generate(bare.ended.output, instruction_prompt("Tom has 3 pens and gets 4. How many pens?"))


def test_saved_folder_is_that_of_a_plain_model_with_a_card(bare: BareRun) -> None:
    """Nothing of LIFT is left in the weights, the base's configuration is kept, and the card says what was done."""
    keys = safe_open(bare.ended.output / "model.safetensors", "pt").keys()
    assert not [key for key in keys if "principal" in key]
    assert AutoConfig.from_pretrained(bare.ended.output).use_cache == AutoConfig.from_pretrained(bare.base).use_cache
    card = (bare.ended.output / "README.md").read_text()
    assert "LIFT (" in card
    assert "None" not in card
    for setting in (f"LIFT: budget_rank | {BUDGET_RANK} |", f"LIFT: refresh_interval | {INTERVAL} |", "word problems"):
        assert setting in card, card


def test_the_delta_beside_the_model_gives_it_back_to_the_bit(bare: BareRun, tmp_path: Path) -> None:
    """And holds the entries that changed, which the log counts."""
    file = bare.ended.output / "delta.safetensors"
    assert f"{file}: {headline(inspect_delta(file))}" in bare.ended.stdout
    apply_deltas(str(bare.base), [file], tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    saved = load_file(bare.ended.output / "model.safetensors")
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[name], saved[name]) for name in saved)


def test_nothing_but_managed_matrices_changes(bare: BareRun) -> None:
    for name, before in bare.before.items():
        assert is_managed(name) != torch.equal(bare.after[name], before), name


def test_no_more_entries_change_than_were_selected(bare: BareRun) -> None:
    trained_on = [churn for step, churn in bare.ended.refreshes() if step < STEPS]
    changed_in_all = entries_in_all = 0
    for name in filter(is_managed, bare.before):
        changed = int((bare.after[name] != bare.before[name]).sum())
        entries = BUDGET_RANK * sum(bare.before[name].shape)
        assert 0 < changed <= entries * (1 + len(trained_on)), name
        changed_in_all, entries_in_all = changed_in_all + changed, entries_in_all + entries
    # Churn is printed to a tenth of a percent.
    assert changed_in_all <= entries_in_all * (1 + sum(churn + 0.0005 for churn in trained_on))


def test_the_largest_entries_of_the_approximation_are_trained(bare: BareRun) -> None:
    """The definition, written out again: a mask of the smallest entries, as in the published code, fails."""
    for name in filter(is_managed, bare.before):
        before = bare.before[name]
        u, s, v = torch.linalg.svd(before, full_matrices=False)
        approximation = (u[:, :LRA_RANK] * s[:LRA_RANK]) @ v[:LRA_RANK]
        chosen = approximation.abs().flatten().topk(BUDGET_RANK * sum(before.shape)).indices
        changed = (bare.after[name] != before).flatten()[chosen]
        # An entry whose gradient is zero or whose updates cancel stays; the solvers may differ in an entry of 10,000.
        assert changed.float().mean() > 0.99, name


def test_a_finished_run_runs_its_exit_handlers_and_keeps_its_code() -> None:
    code = (
        "import atexit\nfrom lift_ds.training import endings, main\natexit.register(print, 'handled')\nendings.end(3)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 3
    assert ended.stdout.endswith("handled\n")
