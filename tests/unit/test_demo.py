"""Pins down the run that needs no download: its texts, its cached base model, its flags."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lift_ds.training.data import instruction_prompt, load_file
from lift_ds.training.demo import base, run, texts

TINY = base.BaseSettings(
    hidden_size=32, layers=1, heads=2, intermediate_size=64, vocab_size=320, block_size=32, batch_size=2, steps=2,
    stories=60, problems=20, held_out=8,
)  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(base.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_texts_follow_the_seed_and_do_not_repeat() -> None:
    """Held-out rows are the last of a list of different ones, so none of them is trained on."""
    assert texts.stories(50, 1) == texts.stories(50, 1) != texts.stories(50, 2)
    rows = texts.problems(500, 3)
    assert rows == texts.problems(500, 3)
    assert len({row["instruction"] for row in rows}) == 500


def test_problems_are_solved_correctly() -> None:
    """The working of every problem adds up to its answer: a model is not taught wrong sums."""
    for row in texts.problems(300, 0):
        sum_, result = row["output"].split(". ")[-2].split(" = ")
        assert eval(sum_) == int(result) == int(row["answer"])
        assert row["output"].endswith(f"The answer is {row['answer']}.")


def test_builder_writes_what_a_real_run_is_given(tmp_path: Path) -> None:
    """Model, tokenizer and data load by the ordinary ways; one token a digit, nothing lost in a round trip."""
    base.build_base(tmp_path, TINY)
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.eos_token_id == model.config.eos_token_id != tokenizer.pad_token_id
    text = "Ben has 4096 — naïve 北京 — apples.\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert [tokenizer.decode([i]) for i in tokenizer("4096")["input_ids"]] == list("4096")
    train = load_file(tmp_path / base.TRAIN_FILE)
    held_out = load_file(tmp_path / base.HELD_OUT_FILE)
    assert (len(train), len(held_out)) == (20, 8)
    assert not set(train["prompt"]) & set(held_out["prompt"])
    stories = json.loads((tmp_path / base.STORIES_FILE).read_text())
    assert len(stories) == 8
    assert {name: rows.to_list() for name, rows in run.held_out(tmp_path).items()} == {
        run.NEW: held_out.to_list(),
        run.OLD: stories,
    }
    # The prompt's tokens are the first of those of prompt and completion, so the loss starts at the response.
    prompt = tokenizer(instruction_prompt("How many?"))["input_ids"]
    assert tokenizer(instruction_prompt("How many?") + "Ben has 3.")["input_ids"][: len(prompt)] == prompt


def test_cache_is_named_by_its_settings(cache: Path) -> None:
    """Another setting is another base, so a stale one is never used."""
    other = base.BaseSettings(seed=1)
    assert base.base_folder(base.BaseSettings()).parent == cache
    assert base.base_folder(base.BaseSettings()) == base.base_folder(base.BaseSettings())
    assert base.base_folder(other) != base.base_folder(base.BaseSettings())


def test_ranks_that_do_not_build_wait_for_the_one_that_does(cache: Path) -> None:
    """The folder appears whole or not at all, and whoever waits gets it."""
    folder = base.base_folder(TINY)

    def appear() -> None:
        time.sleep(0.5)
        folder.mkdir(parents=True)

    builder = threading.Thread(target=appear)
    builder.start()
    assert base.ensure_base(TINY, build_here=False, timeout=30) == folder
    builder.join()
    assert base.ensure_base(TINY, build_here=True) == folder


def test_waiting_is_bounded(cache: Path) -> None:
    """A builder on another rank that died must not leave this one waiting for ever."""
    with pytest.raises(TimeoutError, match="was not built within"):
        base.ensure_base(TINY, build_here=False, timeout=0.3)


def test_a_failed_build_leaves_nothing_in_the_cache(cache: Path) -> None:
    """The builder's own last words are passed on, and the next run starts clean."""
    broken = dataclasses.replace(TINY, held_out="many")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"building the base model failed with code 1:\n(.*\n)*.*TypeError"):
        base.ensure_base(broken, build_here=True, timeout=120)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the variable that moves the cache."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(base.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    with pytest.raises(ValueError, match=base.CACHE_VARIABLE):
        base.ensure_base(TINY, build_here=True)


def test_flags_that_were_given_stay() -> None:
    """What the user said, in one spelling or the other, is not overridden and not listed as if it were."""
    values = dict.fromkeys(run.SETTINGS) | {"density": 0.3, "num_train_epochs": 2, "logging_steps": 1}
    line = run.settle(values, {"density", "num_train_epochs", "logging_steps"})
    assert (values["budget_rank"], values["max_steps"], values["logging_steps"]) == (None, None, 1)
    assert values["lra_rank"] == run.SETTINGS["lra_rank"]
    assert f"--lra_rank {run.SETTINGS['lra_rank']}" in line
    assert "--budget_rank" not in line
    assert "--logging_steps" not in line
