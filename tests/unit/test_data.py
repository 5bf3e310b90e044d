"""Pins down lift_ds.training.data: what rows become, and what is said of rows and files that cannot be used."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from datasets import Dataset

from lift_ds.training.data import (
    check_chat_template,
    check_loss,
    hold_out,
    instruction_prompt,
    load_file,
    load_named,
    normalise_row,
)

QUESTION = {"role": "user", "content": "How many?"}
ANSWER = {"role": "assistant", "content": "Three."}
ROW = {"instruction": "Add 1 and 2.", "input": "", "output": "3"}
HUMAN = {"from": "human", "value": "How many?"}
GPT = {"from": "gpt", "value": "Three."}


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_prompt_is_the_alpaca_frame_and_ends_where_the_response_begins() -> None:
    """The frame is fixed to the character: a published evaluation of this kind is sensitive to its white space."""
    assert instruction_prompt("Add 1 and 2.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd 1 and 2.\n\n### Response:\n"
    )
    assert "\n\n### Input:\n1 and 2\n\n### Response:\n" in instruction_prompt("Add these.", "1 and 2")


def test_braces_in_a_row_are_text() -> None:
    """Code and LaTeX are full of braces, which a format string would read."""
    assert "{x} and {input}" in instruction_prompt("{x} and {input}", "{0}")


@pytest.mark.parametrize("context", [{"input": ""}, {"input": None}, {}])
def test_empty_input_is_left_out_of_the_frame(context: dict[str, str | None]) -> None:
    """An input that is empty, null or absent gives one and the same prompt."""
    row = normalise_row({"instruction": "Add 1 and 2.", "output": "3", **context}, "here")
    assert row == {"prompt": instruction_prompt("Add 1 and 2."), "completion": "3"}


def test_output_does_not_start_with_white_space() -> None:
    """Leading white space would merge with the frame's line break and change the prompt's last token."""
    assert normalise_row(ROW | {"output": "\n 3\n"}, "here")["completion"] == "3"


def test_prompt_and_completion_are_kept_as_they_are() -> None:
    """Rows that bring their own prompt are not framed, stripped or touched."""
    row = {"prompt": "Q: ", "completion": " A\n"}
    assert normalise_row(row | {"more": 1}, "here") == row
    chat = {"prompt": [QUESTION], "completion": [ANSWER]}
    assert normalise_row(chat, "here") == chat


def test_messages_split_before_the_last_answer() -> None:
    """A chat trains its last turn, given all the turns before."""
    row = normalise_row({"messages": [QUESTION, ANSWER, QUESTION, ANSWER]}, "here")
    assert row == {"prompt": [QUESTION, ANSWER, QUESTION], "completion": [ANSWER]}


def test_sharegpt_turns_become_messages() -> None:
    """The same chat in the other spelling trains the same."""
    system = {"from": "system", "value": "Be brief."}
    row = normalise_row({"id": "x", "conversations": [system, HUMAN, GPT]}, "here")
    assert row == {"prompt": [{"role": "system", "content": "Be brief."}, QUESTION], "completion": [ANSWER]}


@pytest.mark.parametrize("asking", ["human", "user"])
@pytest.mark.parametrize("answering", ["gpt", "assistant", "chatgpt", "model", "bot"])
def test_every_name_of_a_sharegpt_speaker_is_known(asking: str, answering: str) -> None:
    """Data sets of this kind do not agree on what the two sides are called."""
    row = normalise_row({"conversations": [HUMAN | {"from": asking}, GPT | {"from": answering}]}, "here")
    assert row == {"prompt": [QUESTION], "completion": [ANSWER]}


def test_text_is_kept_as_it_is_and_has_no_prompt() -> None:
    """Without a prompt TRL learns all of a row; white space is part of the text."""
    assert normalise_row({"text": " Once.\n", "more": 1}, "here") == {"text": " Once.\n"}


def test_a_text_beside_another_layout_is_not_used() -> None:
    """Published instruction data carry the framed row as a `text` too."""
    assert normalise_row(ROW | {"text": "framed"}, "here")["completion"] == "3"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "a", "answer": "b"},
            "instruction/input/output, prompt/completion, messages, conversations or text.*answer, question",
        ),
        (ROW | {"output": "  "}, "'output' has no text"),
        (ROW | {"output": 3}, "'output' must be a string, not int"),
        (ROW | {"instruction": ""}, "'instruction' is empty"),
        ({"prompt": "a", "completion": ""}, "'completion' has no text"),
        ({"prompt": "a", "completion": [ANSWER]}, "both be strings or both lists"),
        ({"messages": [QUESTION]}, "at least two messages"),
        ({"messages": [ANSWER, QUESTION]}, "must be the assistant's, not the user's"),
        ({"messages": ["hello", "you"]}, "'role' and 'content'"),
        ({"messages": [QUESTION, ANSWER | {"content": None}]}, "must be a string, not NoneType"),
        ({"text": " \n"}, "'text' is empty"),
        ({"text": ["a"]}, "'text' must be a string, not list"),
        ({"conversations": [HUMAN]}, "'conversations' must be a list of at least two messages"),
        ({"conversations": [GPT, HUMAN]}, "must be the assistant's, not the user's"),
        ({"conversations": [QUESTION, ANSWER]}, "each entry of 'conversations' .* 'from' and 'value'"),
        (
            {"conversations": [HUMAN, GPT | {"from": "tool"}]},
            "a turn from 'tool'; known are human, user, gpt, .*system",
        ),
        ({"conversations": [HUMAN, GPT | {"value": 3}]}, "'conversations value' must be a string, not int"),
        ({"conversations": [HUMAN, GPT | {"value": ""}]}, "'conversations' has no text"),
    ],
)
def test_unusable_rows_are_refused_by_what_is_wrong(row: dict[str, object], message: str) -> None:
    """Every refusal names the row and says what a valid one would have."""
    with pytest.raises(ValueError, match=f"^rows.json, row 7: .*{message}"):
        normalise_row(row, "rows.json, row 7")


@pytest.mark.parametrize("layout", ["array", "indented array", "lines", "lines with blanks and a byte-order mark"])
def test_array_and_lines_load_alike(layout: str, tmp_path: Path) -> None:
    """The form is told from the content, not from the file name."""
    rows = [ROW, ROW | {"output": "a\u2028b"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = {
        "array": json.dumps(rows),
        "indented array": "\n" + json.dumps(rows, indent=2),
        "lines": "\n".join(lines) + "\n",
        "lines with blanks and a byte-order mark": "\ufeff" + "\r\n\r\n".join(lines),
    }[layout]
    loaded = load_file(write(tmp_path / "rows.txt", text))
    assert loaded["completion"] == ["3", "a\u2028b"]
    assert loaded.column_names == ["prompt", "completion"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[\n {},\n {]\n", "line 3, column .*not a valid JSON array"),
        ('{"instruction": "a", "output": "b"}\n\n{"instruction": \n', "line 3, column .*not a JSON object"),
        (json.dumps(ROW) + '\n"text"\n', "line 2: a row must be a JSON object.*not str"),
        (json.dumps([ROW, {"body": "a"}]), "row 2: a row needs .*: body$"),
        (json.dumps(ROW) + "\n\n" + json.dumps({"body": "a"}), "line 3: a row needs .*: body$"),
        (json.dumps([ROW, {"messages": [QUESTION, ANSWER]}]), "row 2: chat rows and plain-text rows cannot be mixed"),
        (json.dumps([{"conversations": [HUMAN, GPT]}, ROW]), "row 2: chat rows and plain-text rows cannot be mixed"),
        (json.dumps([ROW, {"text": "a"}]), "row 2: plain-text rows and rows of 'text' alone cannot be mixed"),
        ("[]", "holds no rows"),
        ("", "holds no rows"),
    ],
)
def test_unusable_files_are_refused_by_line_or_row(text: str, message: str, tmp_path: Path) -> None:
    """Lines are counted as an editor counts them, rows from one."""
    path = write(tmp_path / "rows.json", text)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}.*{message}"):
        load_file(path)


def test_text_and_sharegpt_files_load(tmp_path: Path) -> None:
    """Chats of both spellings may share a file, as they become the same."""
    text = write(tmp_path / "text.jsonl", '{"text": "Once."}\n{"text": "Twice.", "id": 2}\n')
    assert load_file(text).to_list() == [{"text": "Once."}, {"text": "Twice."}]
    chats = write(
        tmp_path / "chats.json", json.dumps([{"conversations": [HUMAN, GPT]}, {"messages": [QUESTION, ANSWER]}])
    )
    assert load_file(chats).to_list() == [{"prompt": [QUESTION], "completion": [ANSWER]}] * 2


def test_missing_and_binary_files_are_refused(tmp_path: Path) -> None:
    """What is no text file at all is refused before anything is parsed."""
    with pytest.raises(ValueError, match="does not exist"):
        load_file(tmp_path / "none.json")
    with pytest.raises(ValueError, match="is a directory"):
        load_file(tmp_path)
    (tmp_path / "b.json").write_bytes(b"[\xff\xfe]")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_file(tmp_path / "b.json")


def test_named_data_sets_are_checked_like_files(tmp_path: Path) -> None:
    """A data set saved by `datasets` gives the same rows; a split that is not there is named."""
    Dataset.from_list([ROW, ROW]).save_to_disk(tmp_path / "saved")
    assert load_named(str(tmp_path / "saved"))["completion"] == ["3", "3"]
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "train.jsonl", json.dumps(ROW) + "\n" + json.dumps(ROW | {"output": ""}) + "\n")
    with pytest.raises(ValueError, match="train row 2: 'output' has no text"):
        load_named(str(tmp_path / "folder"))
    with pytest.raises(ValueError, match="--dataset_split 'exam'"):
        load_named(str(tmp_path / "folder"), split="exam")


def test_held_out_rows_follow_the_seed_and_never_stay_in_training() -> None:
    """Every rank splits for itself, so the split must depend on nothing but data and seed."""
    rows = Dataset.from_list([{"prompt": str(i), "completion": "x"} for i in range(20)])
    train, held_out = hold_out(rows, 0.25, seed=3)
    assert len(held_out) == 5
    assert sorted([*train["prompt"], *held_out["prompt"]], key=int) == rows["prompt"][:]
    assert hold_out(rows, 5, seed=3)[1]["prompt"][:] == held_out["prompt"][:]
    assert hold_out(rows, 5, seed=4)[1]["prompt"][:] != held_out["prompt"][:]


@pytest.mark.parametrize("size", [0.0, -1, 20, 0.01, 2.5])
def test_a_split_that_leaves_one_side_empty_is_refused(size: float) -> None:
    """The message says how many rows there are to choose from."""
    rows = Dataset.from_list([{"prompt": "a", "completion": "b"}] * 20)
    with pytest.raises(ValueError, match=r"--eval_split_size.*of 20 rows"):
        hold_out(rows, size, seed=0)


def test_chats_need_a_chat_template() -> None:
    """Without one the chats would be refused far inside the tokenizer; text needs none."""
    chats = Dataset.from_list([{"prompt": [QUESTION], "completion": [ANSWER]}])
    with pytest.raises(ValueError, match="--chat_template_path"):
        check_chat_template(chats, None, None)
    check_chat_template(chats, "{{ messages }}", None)
    check_chat_template(chats, None, "template.jinja")
    check_chat_template(Dataset.from_list([{"prompt": "a", "completion": "b"}]), None, None)


def test_text_has_no_completion_to_learn_alone() -> None:
    """TRL would pass over the flag in silence and learn all of the text."""
    text = Dataset.from_list([{"text": "Once."}])
    with pytest.raises(ValueError, match=r"--completion_only_loss True .*'text' rows"):
        check_loss(text, True)
    check_loss(text, None)
    check_loss(text, False)
    check_loss(Dataset.from_list([{"prompt": "a", "completion": "b"}]), True)
