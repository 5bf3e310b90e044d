"""Sentences of made-up words for trainers of TRL: data, a tokenizer that knows the words, a reward, a small T5."""

from __future__ import annotations

from typing import Any

import cases
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import nn
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

ROWS = 64

#: Of `cases.small_llama`.
_WORDS = {f"t{i}": i for i in range(cases.VOCABULARY)}


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a word."""
    words = Tokenizer(WordLevel(_WORDS, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t1", unk_token="t0")


def sentences(seed: int, words: int, rows: int = ROWS) -> list[str]:
    """A sentence a row, of one length, so that a mean over ranks is one over rows."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, cases.VOCABULARY, (rows, words), generator=generator)
    return [" ".join(f"t{i}" for i in row) for row in tokens.tolist()]


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    """Differs from completion to completion: how many of its words have an even number."""
    return [sum(int(word[1:]) % 2 == 0 for word in text.split()) / 8 for text in completions]


def translations(rows: int = ROWS) -> list[dict[str, list[int]]]:
    """Pairs of token sequences."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(2, cases.VOCABULARY, (rows, 12), generator=generator).tolist()
    return [{"input_ids": row[:7], "attention_mask": [1] * 7, "labels": row[7:]} for row in ids]


def t5() -> nn.Module:
    """An encoder-decoder with the same weights at every call."""
    torch.manual_seed(1)
    settings = {"vocab_size": cases.VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**settings, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0))
