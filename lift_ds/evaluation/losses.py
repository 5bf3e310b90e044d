"""Loss per token, and KL divergence from the base, on files of rows: what a model has learned and what it forgot."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lift_ds.evaluation.models import Loaded
from lift_ds.training.data import Row, is_conversational, is_text, load_file

#: Positions whose logits are held in float32 at once.
_POSITIONS = 256

_IGNORED = -100


@dataclass(frozen=True)
class Sequenced:
    """One row as tokens."""

    tokens: list[int]
    prompt: int  # how many of them are the prompt's; 0 in running text
    cut: bool  # it was longer than the window


@dataclass(frozen=True)
class Sizes:
    """How much is read and computed at once."""

    window: int  # most tokens of a row; the rest is cut off. A plain text is cut into pieces of so many
    batch_size: int  # rows of a forward
    limit: int | None  # most rows; None for all


def loss(loaded: Loaded, path: str, sizes: Sizes) -> dict[str, Any]:
    """Measure the mean next-token loss on a file.

    Args:
        loaded: the model.
        path: rows in a layout that training accepts, or a plain .txt, which is cut into pieces.
        sizes: of rows and batches.

    Returns:
        `value`, nats per token, over completions alone where rows have prompts; its `stderr` over rows; `tokens` that
        were counted, `rows`, and rows that were `cut`.

    Raises:
        ValueError: the file cannot be used, or leaves no token to predict.
    """
    rows = read(path, loaded.tokenizer, _window(loaded.model, sizes.window), sizes.limit)

    def summed(batch: Sequence[Sequenced], tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        labels = tokens.masked_fill(~mask, _IGNORED)
        for number, row in enumerate(batch):
            labels[number, : row.prompt] = _IGNORED
        labels = labels[:, 1:]
        logits = loaded.model(input_ids=tokens, attention_mask=mask.long()).logits[:, :-1]
        counted = labels != _IGNORED
        return _per_row(lambda at: F.cross_entropy(logits[at].float(), labels[at], reduction="none"), counted)

    return _mean(path, rows, loaded, sizes.batch_size, summed, f"loss on {Path(path).name}")


def divergence(loaded: Loaded, base: PreTrainedModel, path: str, sizes: Sizes) -> dict[str, Any]:
    """Measure the mean KL divergence, base from tuned, of the next-token distributions on a file.

    Of rows with a prompt, the distributions after each token of the prompt count; of running text, those after each
    token.

    Args:
        loaded: the tuned model.
        base: the model before training, on the same device.
        path: as for `loss`.
        sizes: of rows and batches.

    Returns:
        As `loss` does, in nats per token: sum over tokens t of base(t) (log base(t) - log tuned(t)).

    Raises:
        ValueError: the file cannot be used, or the two have not the same vocabulary.
    """
    if base.config.get_text_config().vocab_size != loaded.model.config.get_text_config().vocab_size:
        raise ValueError("--base has not the vocabulary of MODEL, so that their distributions cannot be compared")
    window = min(_window(base, sizes.window), _window(loaded.model, sizes.window))
    rows = [
        Sequenced(row.tokens[: row.prompt] if row.prompt else row.tokens, 0, row.cut)
        for row in read(path, loaded.tokenizer, window, sizes.limit)
    ]

    def summed(batch: Sequence[Sequenced], tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        before, after = (model(input_ids=tokens, attention_mask=mask.long()).logits for model in (base, loaded.model))

        def of(at: Any) -> Tensor:
            p, q = (F.log_softmax(logits[at].float(), dim=-1) for logits in (before, after))
            return (p.exp() * (p - q)).sum(dim=-1)

        return _per_row(of, mask)

    return _mean(path, rows, loaded, sizes.batch_size, summed, f"KL on {Path(path).name}")


def read(path: str, tokenizer: PreTrainedTokenizerBase, window: int, limit: int | None) -> list[Sequenced]:
    """Return the rows of a file as tokens, as training would see them.

    Args:
        path: rows in a layout that training accepts, or a plain .txt.
        tokenizer: of the model.
        window: most tokens of a row, and length of the pieces of a plain text.
        limit: most rows or pieces; None for all.

    Raises:
        ValueError: the file cannot be used.
    """
    if Path(path).suffix == ".txt":
        try:
            tokens = tokenizer(Path(path).read_text(encoding="utf-8")).input_ids
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text (byte {error.start}: {error.reason})") from None
        pieces = [tokens[start : start + window] for start in range(0, len(tokens), window)]
        return [Sequenced(piece, 0, False) for piece in pieces[:limit]]
    rows = load_file(path)
    if is_conversational(rows[0]) and not tokenizer.chat_template:
        raise ValueError(f"{path} holds chat messages, and the model's tokenizer has no chat template")
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    return [_sequenced(row, tokenizer, window) for row in rows]


def _sequenced(row: Row, tokenizer: PreTrainedTokenizerBase, window: int) -> Sequenced:
    if is_text(row):
        tokens, prompt = tokenizer(_ended(row["text"], tokenizer)).input_ids, 0
    elif is_conversational(row):
        prompt_tokens = _chat(tokenizer, row["prompt"], add_generation_prompt=True)
        tokens = _chat(tokenizer, [*row["prompt"], *row["completion"]], add_generation_prompt=False)
        prompt = _common(prompt_tokens, tokens)
    else:
        prompt_tokens = tokenizer(row["prompt"]).input_ids
        tokens = tokenizer(row["prompt"] + _ended(row["completion"], tokenizer)).input_ids
        prompt = _common(prompt_tokens, tokens)
    return Sequenced(tokens[:window], min(prompt, window), len(tokens) > window)


def _ended(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Close a text as training closes it."""
    return text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token


def _chat(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], *, add_generation_prompt: bool) -> list[int]:
    return tokenizer.apply_chat_template(
        turns, tokenize=True, return_dict=True, add_generation_prompt=add_generation_prompt
    )["input_ids"]


def _common(prompt: list[int], tokens: list[int]) -> int:
    """Return how many tokens a row shares with its prompt alone, whose last may have merged with what follows."""
    pairs = zip(prompt, tokens, strict=False)
    return next((count for count, (left, right) in enumerate(pairs) if left != right), min(len(prompt), len(tokens)))


def _window(model: PreTrainedModel, window: int) -> int:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(window, positions) if positions else window


def _per_row(values: Callable[[Any], Tensor], counted: Tensor) -> tuple[Tensor, Tensor]:
    """Sum what is computed of logits, for each row, a few positions at a time.

    Args:
        values: index of a [rows, positions] grid -> values there [n].
        counted: which of the positions count, bool [rows, positions].

    Returns:
        Sums in float64 and numbers of positions, [rows] each, on the CPU.
    """
    sums = torch.zeros(len(counted), dtype=torch.float64)
    row, position = counted.nonzero(as_tuple=True)
    for rows, positions in zip(row.split(_POSITIONS), position.split(_POSITIONS), strict=True):
        sums.index_add_(0, rows.cpu(), values((rows, positions)).double().cpu())
    return sums, counted.sum(dim=1).cpu()


@torch.no_grad()
def _mean(
    path: str,
    rows: Sequence[Sequenced],
    loaded: Loaded,
    batch_size: int,
    summed: Callable[[Sequence[Sequenced], Tensor, Tensor], tuple[Tensor, Tensor]],
    about: str,
) -> dict[str, Any]:
    """Return a mean over tokens, and its standard error over rows."""
    sums, counts = [torch.zeros(0, dtype=torch.float64)], [torch.zeros(0, dtype=torch.int64)]
    with tqdm(total=len(rows), desc=about, unit="row") as progress:
        for batch in _batches(rows, batch_size):
            of_rows, of_counts = summed(batch, *_padded(batch, loaded.model.device))
            sums.append(of_rows)
            counts.append(of_counts)
            progress.update(len(batch))
    total, tokens = torch.cat(sums), torch.cat(counts)
    number = int(tokens.sum())
    if number == 0:
        raise ValueError(f"{path}: no row has a token that counts; --window may cut them off")
    mean = float(total.sum()) / number
    return {
        "value": mean,
        "stderr": _error(total - mean * tokens, number),
        "tokens": number,
        "rows": len(rows),
        "cut": sum(row.cut for row in rows),
    }


def _error(residuals: Tensor, number: int) -> float | None:
    """Return the standard error of a ratio of sums, by the rows' residuals; None for a single row."""
    count = len(residuals)
    return math.sqrt(float(residuals.square().sum()) * count / (count - 1)) / number if count > 1 else None


def _batches(rows: Sequence[Sequenced], size: int) -> Iterator[Sequence[Sequenced]]:
    """Long rows first, so that a batch that does not fit into memory fails at once, and padding is little."""
    order = sorted(rows, key=lambda row: -len(row.tokens))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _padded(batch: Sequence[Sequenced], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return tokens and which of them are no padding, [rows, longest] each, padded on the right."""
    longest = max(len(row.tokens) for row in batch)
    tokens = torch.zeros(len(batch), longest, dtype=torch.int64)
    mask = torch.zeros(len(batch), longest, dtype=torch.bool)
    for number, row in enumerate(batch):
        tokens[number, : len(row.tokens)] = torch.tensor(row.tokens)
        mask[number, : len(row.tokens)] = True
    return tokens.to(device), mask.to(device)
