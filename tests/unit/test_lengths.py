"""Pins what becomes of rows that are longer than --max_length, and what is said of them.

The tokenizer has a token for a word, so that every length can be counted by eye. TRL's own trainer says what it does
with the same rows: what is prepared has to be the same, and the log line has to be true of it.
"""

from __future__ import annotations

import re
import tempfile
from typing import Any

import pytest
from cases import small_llama
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import SFTTrainer

from lift_ds.training.arguments import TrainArguments
from lift_ds.training.checked_trainer import CheckedTrainer

WORDS = ["<eos>", "q", "a", "user", "assistant"]
TEMPLATE = (
    "{% for turn in messages %}{{ turn['role'] }} {{ turn['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
LIMIT = 8


class CountingTokenizer(PreTrainedTokenizerFast):
    """A token for each word; counts how often it is called."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().__call__(*args, **kwargs)


def tokenizer(template: str = TEMPLATE) -> CountingTokenizer:
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return CountingTokenizer(tokenizer_object=words, eos_token="<eos>", chat_template=template)


def pair(asked: int, answered: int) -> dict[str, str]:
    """A row of `asked + answered + 1` tokens; the last one ends it."""
    return {"prompt": "q " * asked, "completion": " ".join(["a"] * answered)}


def chat(asked: int, answered: int) -> dict[str, list[dict[str, str]]]:
    """A row of `asked + answered + 2` tokens: the template writes who speaks, and no end."""
    question = {"role": "user", "content": " ".join(["q"] * asked)}
    return {"prompt": [question], "completion": [{"role": "assistant", "content": " ".join(["a"] * answered)}]}


def text(length: int) -> dict[str, str]:
    """A row of `length + 1` tokens."""
    return {"text": " ".join(["q"] * length)}


#: 6 and 8 tokens, which fit; 12, of which some of the answer stays; 10 and 13, whose prompts fill the limit.
PAIRS = [pair(3, 2), pair(3, 4), pair(3, 8), pair(8, 1), pair(9, 3)]


def trainer_of(
    rows: list[Any],
    held_out: list[Any] | None = None,
    kind: type[SFTTrainer] = CheckedTrainer,
    words: PreTrainedTokenizerFast | None = None,
    **flags: Any,
) -> Any:
    settings = {"learning_rate": 1e-3, "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-8}
    args = TrainArguments(
        output_dir=tempfile.gettempdir(), report_to="none", disable_tqdm=True, bf16=False, **settings, **flags
    )
    return kind(
        model=small_llama(),
        args=args,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=None if held_out is None else Dataset.from_list(held_out),
        processing_class=words or tokenizer(),
    )


def lengths(trainer: SFTTrainer) -> list[int]:
    return [len(ids) for ids in trainer.train_dataset["input_ids"]]


def test_rows_that_are_cut_are_counted_once_with_what_they_lose(lift_log: list[str]) -> None:
    trainer = trainer_of(PAIRS, max_length=LIMIT)
    assert lift_log == [
        "WARNING 3 of 5 training rows are longer than --max_length 8 (the longest has 13 tokens): they are cut there, "
        "and the end of the answer is lost; 2 of them lose all of the answer and count for nothing. Raise "
        "--max_length, or leave these rows out with --drop_long_rows"
    ]
    assert lengths(trainer) == [6, 8, 8], "TRL leaves out the two rows that have nothing to learn"


def test_long_rows_are_left_out_where_that_is_asked_for(lift_log: list[str]) -> None:
    trainer = trainer_of(PAIRS, max_length=LIMIT, drop_long_rows=True)
    assert lengths(trainer) == [6, 8]
    assert lift_log == [
        "INFO 3 of 5 training rows are longer than --max_length 8 (the longest has 13 tokens) and are left out "
        "(--drop_long_rows)"
    ]


@pytest.mark.parametrize(
    "flags", [{"max_length": 13}, {"max_length": 13, "drop_long_rows": True}, {"max_length": None}]
)
def test_nothing_is_said_where_every_row_fits(flags: dict[str, Any], lift_log: list[str]) -> None:
    """A row as long as the limit fits, with its end-of-text token."""
    assert lengths(trainer_of(PAIRS, **flags)) == [6, 8, 12, 10, 13]
    assert lift_log == []


def test_held_out_rows_are_counted_for_themselves(lift_log: list[str]) -> None:
    trainer = trainer_of(PAIRS[:2], PAIRS, max_length=LIMIT, drop_long_rows=True)
    (line,) = lift_log
    assert line.startswith("INFO 3 of 5 held-out rows are longer than --max_length 8")
    assert len(trainer.eval_dataset) == trainer.rows_to_evaluate() == 2


@pytest.mark.parametrize(
    ("flags", "rows"),
    [
        ({"max_length": None}, 5),
        ({"max_length": LIMIT}, 3),
        ({"max_length": LIMIT, "packing": True}, 5),
        ({"max_length": LIMIT, "packing": True, "drop_long_rows": True}, 2),
    ],
)
def test_the_rows_that_are_evaluated_are_counted(flags: dict[str, Any], rows: int) -> None:
    """Rows that are left out do not count, whether by the flag or by TRL; packs count by the rows in them."""
    assert trainer_of(PAIRS, PAIRS, **flags).rows_to_evaluate() == rows


def test_chats_are_counted_as_the_template_writes_them(lift_log: list[str]) -> None:
    """The chats have 8 and 9 tokens, the names of the speakers among them."""
    assert lengths(trainer_of([chat(3, 3), chat(3, 4)], max_length=LIMIT, drop_long_rows=True)) == [8]
    assert lift_log[0].startswith("INFO 1 of 2 training rows are longer than --max_length 8 (the longest has 9 tokens)")


def test_all_of_a_text_is_learned_and_its_end_is_lost(lift_log: list[str]) -> None:
    """The first row ends with the end-of-text token, which is learned too."""
    trainer = trainer_of([text(4), text(9)], max_length=LIMIT)
    assert trainer.train_dataset["input_ids"][:] == trainer.train_dataset["labels"][:] == [[1, 1, 1, 1, 0], [1] * 8]
    (line,) = lift_log
    assert "they are cut there, and the end of the text is lost. Raise" in line


@pytest.mark.filterwarnings("ignore:The .'keep_end'. truncation mode:FutureWarning")
@pytest.mark.parametrize(("packing", "lost"), [(False, "start of the row"), (True, "end of the answer")])
def test_keeping_the_end_loses_the_start_and_packing_does_not_keep_it(
    packing: bool, lost: str, lift_log: list[str]
) -> None:
    """The second row has to lose its one `q`, or its end-of-text token."""
    rows = [pair(1, 2), pair(1, LIMIT - 1)]
    trainer = trainer_of(rows, max_length=LIMIT, truncation_mode="keep_end", packing=packing)
    tokens = [token for ids in trainer.train_dataset["input_ids"] for token in ids]
    q, end = tokens.count(WORDS.index("q")), tokens.count(WORDS.index("<eos>"))
    assert (q, end) == ((2, 1) if packing else (1, 2))
    (line,) = lift_log
    assert f"they are cut there, and the {lost} is lost. Raise" in line


@pytest.mark.parametrize(
    ("strategy", "tokens", "said"),
    [
        ("bfd", 6 + 4 * LIMIT, "are cut there, and the end of the answer is lost; 2 of them lose all of the answer"),
        ("bfd_split", 6 + 8 + 12 + 10 + 13, r"packing makes pieces of them \(bfd_split\)"),
        ("wrapped", 6 + 8 + 12 + 10 + 13, r"packing cuts every row where a pack is full, shorter ones too \(wrapped\)"),
    ],
)
def test_what_is_said_of_packing_is_what_it_does(strategy: str, tokens: int, said: str, lift_log: list[str]) -> None:
    """One strategy loses what does not fit; the others lose no token."""
    trainer = trainer_of(PAIRS, max_length=LIMIT, packing=True, packing_strategy=strategy)
    assert sum(lengths(trainer)) == tokens
    (line,) = lift_log
    assert line.startswith("WARNING 3 of 5 training rows are longer than --max_length 8 (the longest has 13 tokens): ")
    assert re.search(said, line)


def test_long_rows_are_left_out_of_packs_too() -> None:
    trainer = trainer_of(PAIRS, max_length=LIMIT, packing=True, packing_strategy="wrapped", drop_long_rows=True)
    assert sum(lengths(trainer)) == 6 + 8


@pytest.mark.parametrize(
    "flags",
    [
        {"max_length": LIMIT},
        {"max_length": None},
        {"max_length": LIMIT, "shuffle_dataset": True},
        {"max_length": LIMIT, "packing": True},
        {"max_length": LIMIT, "packing": True, "packing_strategy": "wrapped", "shuffle_dataset": True},
        {"max_length": LIMIT, "packing": True, "eval_packing": False},
    ],
)
@pytest.mark.parametrize("rows", [PAIRS, [chat(3, 3), chat(3, 9)], [text(4), text(9)]], ids=["pairs", "chats", "text"])
def test_rows_are_prepared_as_by_trl_alone(rows: list[Any], flags: dict[str, Any]) -> None:
    """Counting changes neither what is trained and evaluated nor how often a row is tokenized."""
    ours, trls = tokenizer(), tokenizer()
    counted = trainer_of(rows, rows, words=ours, **flags)
    alone = trainer_of(rows, rows, kind=SFTTrainer, words=trls, **flags)
    for name in ("train_dataset", "eval_dataset"):
        columns = ["input_ids", "labels"]
        prepared = [getattr(trainer, name).select_columns(columns).to_list() for trainer in (counted, alone)]
        assert prepared[0] == prepared[1]
    assert ours.calls == trls.calls > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"max_length": 3}, "--max_length 3 leaves no token of the answer in any of the 5 training rows"),
        ({"max_length": 3, "packing": True}, "--max_length 3 leaves no token of the answer in any of the 5 training"),
        (
            {"max_length": 5, "drop_long_rows": True},
            "--max_length 5 with --drop_long_rows leaves none of the 5 training",
        ),
        (
            {"max_length": 5, "drop_long_rows": True, "packing": True},
            "--max_length 5 with --drop_long_rows leaves none",
        ),
    ],
)
def test_a_limit_that_leaves_nothing_is_refused_with_one_that_would_do(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}.*; the shortest needs --max_length 6$"):
        trainer_of(PAIRS, **flags)
    trainer_of(PAIRS, **{**flags, "max_length": 6})


def test_held_out_rows_of_which_nothing_is_left_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--max_length 8 leaves no token of the answer in any of the 2 held-out rows"):
        trainer_of(PAIRS, PAIRS[3:], max_length=LIMIT)


@pytest.mark.parametrize("length", [LIMIT, None])
def test_a_template_that_leaves_answers_out_is_not_taken_for_a_short_limit(length: int | None) -> None:
    template = "{% for turn in messages if turn['role'] == 'user' %}{{ turn['content'] }} {% endfor %}"
    with pytest.raises(ValueError, match="none of the 1 training rows has a token to learn, as the chat template"):
        trainer_of([chat(3, 3)], words=tokenizer(template), max_length=length)
