"""Training data: read it, check every row, and bring it to a layout of TRL's.

A row has one of five layouts. The first four become a prompt and a completion:

    instruction, input, output     framed as in Alpaca; `input` may be empty or absent
    prompt, completion             used as it is: two strings, or two lists of chat messages
    messages                       a chat; its last turn, the assistant's, is the completion, the rest the prompt
    conversations                  the same as ShareGPT writes it: turns of `from` and `value`
    text                           used as it is; all of it is learned

The frame lives here alone, so that training, evaluation and generation cannot drift apart.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

ROW_LAYOUTS = "instruction/input/output, prompt/completion, messages, conversations or text"

#: The field of running text, here and in TRL.
TEXT_FIELD = "text"

#: What ShareGPT data call a speaker -> the role that chat templates know.
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
}

_FRAME = (
    "Below is an instruction that describes a task{with_input}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
_WITH_INPUT = ", paired with an input that provides further context"

Row = dict[str, Any]


def instruction_prompt(instruction: str, input: str = "") -> str:
    """Frame an instruction the way training and evaluation both do.

    Args:
        instruction: what is asked.
        input: further context; left out of the frame when empty.

    Returns:
        The prompt, ending where the response begins.
    """
    with_input, framed = (_WITH_INPUT, f"### Input:\n{input.strip()}\n\n") if input.strip() else ("", "")
    return _FRAME.format(with_input=with_input, instruction=instruction.strip(), input=framed)


def normalise_row(row: Mapping[str, Any], where: str) -> Row:
    """Bring one row to `{"prompt", "completion"}`, both strings or both lists of chat messages, or to `{"text"}`.

    Args:
        row: a row in one of the five layouts; of several that it has, the first in their order counts.
        where: how to call the row in an error, for example "train.jsonl, line 7".

    Returns:
        The row in TRL's prompt/completion layout; running text in its language-modeling layout.

    Raises:
        ValueError: the row has none of the layouts, a field of the wrong type, or nothing to learn from.
    """
    keys = {key for key, value in row.items() if value is not None}
    if {"instruction", "output"} <= keys:
        return _from_instruction(row, where)
    if {"prompt", "completion"} <= keys:
        return _from_prompt(row, where)
    for field in ("messages", "conversations"):
        if field in keys:
            return _from_chat(row[field], field, where)
    if TEXT_FIELD in keys:
        return _from_text(row[TEXT_FIELD], where)
    found = ", ".join(sorted(map(str, keys))) or "none"
    raise ValueError(f"{where}: a row needs {ROW_LAYOUTS}, this one has the keys: {found}")


def _from_instruction(row: Mapping[str, Any], where: str) -> Row:
    instruction = _text(row["instruction"], "instruction", where)
    context = "" if row.get("input") is None else _text(row["input"], "input", where)
    # A completion that starts with white space would merge with the frame's last line break in many
    # tokenizers, and the prompt seen in training would not be the prompt seen in generation.
    output = _text(row["output"], "output", where).strip()
    if not instruction.strip():
        raise ValueError(f"{where}: 'instruction' is empty; it needs a text")
    _need_completion(output, "output", where)
    return {"prompt": instruction_prompt(instruction, context), "completion": output}


def _from_prompt(row: Mapping[str, Any], where: str) -> Row:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if not prompt:
            raise ValueError(f"{where}: 'prompt' is empty; it needs a text")
        _need_completion(completion, "completion", where)
        return {"prompt": prompt, "completion": completion}
    if isinstance(prompt, list) and isinstance(completion, list):
        if not prompt or not completion:
            raise ValueError(f"{where}: 'prompt' and 'completion' each need at least one message")
        return {
            "prompt": [_message(turn, "prompt", where) for turn in prompt],
            "completion": [_message(turn, "completion", where) for turn in completion],
        }
    raise ValueError(
        f"{where}: 'prompt' and 'completion' must both be strings or both lists of messages, "
        f"not {type(prompt).__name__} and {type(completion).__name__}"
    )


def _from_text(value: Any, where: str) -> Row:
    text = _text(value, TEXT_FIELD, where)
    if not text.strip():
        raise ValueError(f"{where}: {TEXT_FIELD!r} is empty; it needs a text to learn")
    return {TEXT_FIELD: text}


def _from_chat(messages: Any, field: str, where: str) -> Row:
    if not isinstance(messages, list) or len(messages) < 2:
        raise ValueError(f"{where}: {field!r} must be a list of at least two messages, a question and its answer")
    turns = [_message(turn, field, where) for turn in messages]
    last = turns[-1]
    if last["role"] != "assistant":
        raise ValueError(f"{where}: the last message must be the assistant's, not the {last['role']}'s")
    _need_completion(last["content"], field, where)
    return {"prompt": turns[:-1], "completion": [last]}


def _message(turn: Any, field: str, where: str) -> dict[str, str]:
    is_sharegpt = field == "conversations"
    speaker, said = ("from", "value") if is_sharegpt else ("role", "content")
    if not isinstance(turn, Mapping) or not {speaker, said} <= set(turn):
        raise ValueError(f"{where}: each entry of {field!r} must be an object with {speaker!r} and {said!r}")
    role = _text(turn[speaker], f"{field} {speaker}", where)
    if is_sharegpt:
        if role not in _SPEAKERS:
            raise ValueError(f"{where}: {field!r} has a turn from {role!r}; known are {', '.join(_SPEAKERS)}")
        role = _SPEAKERS[role]
    return {"role": role, "content": _text(turn[said], f"{field} {said}", where)}


def _text(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {field!r} must be a string, not {type(value).__name__}")
    return value


def _need_completion(text: str, field: str, where: str) -> None:
    if not text.strip():
        raise ValueError(f"{where}: {field!r} has no text to learn; the loss is on the completion alone")


def is_conversational(row: Row) -> bool:
    """Tell whether a normalised row holds chat messages, which need a chat template, and not plain text."""
    return isinstance(row.get("prompt"), list)


def is_text(row: Row) -> bool:
    """Tell whether a normalised row holds running text, all of which is learned, and not a prompt and a completion."""
    return TEXT_FIELD in row


def _kind(row: Row) -> str:
    if is_text(row):
        return "rows of 'text' alone"
    return "chat rows" if is_conversational(row) else "plain-text rows"


def read_rows(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Read a JSON array or JSON lines, whichever the file holds.

    Args:
        path: the file.

    Yields:
        Where the row stands, for error messages, and the row.

    Raises:
        ValueError: the file is missing, not UTF-8 text, or malformed; names the line.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise ValueError(f"data file {path} {what}; give a JSON array or a JSON-lines file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"data file {path} is not UTF-8 text (byte {error.start}: {error.reason})") from None
    if text.lstrip().startswith("["):
        yield from _array_rows(path, text)
    else:
        yield from _line_rows(path, text)


def _array_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{path}, {place}: not a valid JSON array ({error.msg})") from None
    for index, row in enumerate(rows):
        yield f"{path}, row {index + 1}", row


def _line_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    # Not splitlines(): it also cuts at separators that are legal inside a JSON string, such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}, line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}, column {error.colno}: not a JSON object ({error.msg}); "
                "give one object a line, or one JSON array"
            ) from None


def load_file(path: str | Path) -> Dataset:
    """Load and check a data file.

    Args:
        path: a JSON array or JSON lines, rows in any of the five layouts.

    Returns:
        The rows as prompt and completion, or as text.

    Raises:
        ValueError: the file cannot be used; names the file and the line or row.
    """
    return Dataset.from_list(list(_checked(read_rows(path), str(path))))


def load_named(name: str, config: str | None = None, split: str = "train") -> Dataset:
    """Load and check a data set by its name on the Hub or its local directory.

    Args:
        name: what `datasets.load_dataset` takes, or a directory written by `save_to_disk`.
        config: the configuration of the data set, where it has several.
        split: the split to take.

    Returns:
        The rows as prompt and completion, or as text.

    Raises:
        ValueError: the data set, configuration or split is not there, or a row cannot be used.
    """
    raw = _load_raw(name, config, split)
    rows = ((f"{name}, {split} row {index + 1}", row) for index, row in enumerate(raw))
    return Dataset.from_list(list(_checked(rows, f"{name}, split {split}")))


def _load_raw(name: str, config: str | None, split: str) -> Iterable[Any]:
    folder = Path(name)
    if any((folder / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
        stored = load_from_disk(name)
        if not isinstance(stored, DatasetDict):
            return stored
        if split not in stored:
            raise ValueError(f"--dataset_split {split!r} is not in {name}; it has: {', '.join(stored)}")
        return stored[split]
    try:
        return load_dataset(name, config, split=split)
    except (OSError, ValueError, DatasetGenerationError) as error:
        given = f"--dataset_name {name!r}, --dataset_config {config!r}, --dataset_split {split!r}"
        raise ValueError(f"{given} cannot be loaded: {str(error).strip() or type(error).__name__}") from error


def _checked(rows: Iterable[tuple[str, Any]], name: str) -> Iterator[Row]:
    first_kind: str | None = None
    for where, row in rows:
        if not isinstance(row, Mapping):
            raise ValueError(f"{where}: a row must be a JSON object with {ROW_LAYOUTS}, not {type(row).__name__}")
        normal = normalise_row(row, where)
        kind = _kind(normal)
        if first_kind is None:
            first_kind = kind
        elif kind != first_kind:
            raise ValueError(f"{where}: {' and '.join(sorted((first_kind, kind)))} cannot be mixed in one data set")
        yield normal
    if first_kind is None:
        raise ValueError(f"{name} holds no rows; it needs at least one with {ROW_LAYOUTS}")


def hold_out(rows: Dataset, size: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split off rows for evaluation.

    Args:
        rows: the data set.
        size: a share below 1, or a number of rows.
        seed: picks the rows; the same seed picks the same rows on every rank.

    Returns:
        What remains for training, and the held-out rows.

    Raises:
        ValueError: the size leaves nothing on one side.
    """
    count = round(size * len(rows)) if 0 < size < 1 else int(size)
    if (count != size and size >= 1) or not 0 < count < len(rows):
        raise ValueError(
            f"--eval_split_size {size:g} holds out {count} of {len(rows)} rows; "
            f"give a share between 0 and 1 or a whole number from 1 to {len(rows) - 1}, or name an --eval_file"
        )
    parts = rows.train_test_split(test_size=count, seed=seed)
    return parts["train"], parts["test"]


def choose(rows: Dataset, most: int, seed: int) -> Dataset:
    """Choose some rows of a data set, for what is not to take long.

    Args:
        rows: the data set.
        most: how many to choose, fewer than there are.
        seed: picks the rows; the same seed picks the same rows on every rank.

    Returns:
        The rows.
    """
    assert 0 < most < len(rows)
    return rows.shuffle(seed=seed).select(range(most))


def check_loss(rows: Dataset, completion_only_loss: bool | None) -> None:
    """Refuse to learn the completion alone from rows that have none.

    Args:
        rows: normalised rows.
        completion_only_loss: what the user asked for, None for nothing.

    Raises:
        ValueError: it is asked for, and the rows are running text.
    """
    if completion_only_loss and is_text(rows[0]):
        raise ValueError(
            f"--completion_only_loss {completion_only_loss} needs rows with a completion; the data holds "
            f"{TEXT_FIELD!r} rows, all of which is learned: leave the flag out, or give rows with prompt/completion"
        )


def check_chat_template(rows: Dataset, chat_template: str | None, chat_template_path: str | None) -> None:
    """Refuse chat rows for a tokenizer that cannot render them.

    Args:
        rows: normalised rows.
        chat_template: the tokenizer's own template.
        chat_template_path: the template the user named, which replaces it.

    Raises:
        ValueError: the rows are chats and there is no template.
    """
    if is_conversational(rows[0]) and not chat_template and not chat_template_path:
        raise ValueError(
            "the data holds chat messages, and the tokenizer has no chat template; "
            "name one with --chat_template_path (a .jinja file, or a model whose template to take)"
        )
