"""Rows that are longer than --max_length: how many there are, what becomes of them, and leaving them out.

The lengths are those of TRL's own tokens, with the chat template and the end-of-text token that it adds.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from datasets import Dataset

from lift_ds.runtime.logs import get_logger
from lift_ds.training.arguments import TrainArguments
from lift_ds.training.data import is_text

logger = get_logger()

#: Label of a token that the loss passes over.
IGNORED = -100

#: What becomes of long rows under the strategies of packing that lose no token. All others cut rows.
_SPLIT = {
    "bfd_split": "packing makes pieces of them (bfd_split), and a piece does not see the one before it",
    "wrapped": "packing cuts every row where a pack is full, shorter ones too (wrapped), and a piece does not see the "
    "one before it",
}


def without_limit(args: TrainArguments) -> TrainArguments:
    """Return arguments by which TRL tokenizes and labels rows, and neither cuts nor reorders them.

    Args:
        args: those of the run; not changed.

    Returns:
        A copy.
    """
    unlimited = copy.copy(args)
    unlimited.max_length, unlimited.shuffle_dataset = None, False
    return unlimited


def fit(rows: Dataset, args: TrainArguments, packing: bool, name: str) -> Dataset:
    """Say what --max_length does to the rows that are longer, and leave them out where that is asked for.

    Args:
        rows: whole rows with `input_ids` and `labels`.
        args: gives the limit, and what is to be done about it.
        packing: whether these rows will be packed.
        name: what to call the rows, for example "training rows".

    Returns:
        The rows that TRL is to cut or to pack.

    Raises:
        ValueError: there is nothing to learn, or nothing would be left.
    """
    if not any(map(_is_learned, rows["labels"])):
        raise ValueError(
            f"none of the {len(rows):,} {name} has a token to learn, as the chat template leaves the answers out; "
            "name another one by --chat_template_path"
        )
    if args.max_length is None:
        return rows
    lengths = [len(ids) for ids in rows["input_ids"]]
    long = [place for place, length in enumerate(lengths) if length > args.max_length]
    if not long:
        return rows
    said = (
        f"{len(long):,} of {len(rows):,} {name} are longer than --max_length {args.max_length} "
        f"(the longest has {max(lengths):,} tokens)"
    )
    all_too_long = f"the {len(rows):,} {name}; the shortest needs --max_length {min(lengths)}"
    if args.drop_long_rows:
        if len(long) == len(rows):
            raise ValueError(f"--max_length {args.max_length} with --drop_long_rows leaves none of {all_too_long}")
        logger.info("%s and are left out (--drop_long_rows)", said)
        return rows.select([place for place, length in enumerate(lengths) if length <= args.max_length])
    if packing and args.packing_strategy in _SPLIT:
        harm = _SPLIT[args.packing_strategy]
    else:
        # Packing keeps the start, whatever the mode says.
        keeps_end = args.truncation_mode == "keep_end" and not packing
        harm = _harm_of_cutting(rows, long, args.max_length, keeps_end, all_too_long)
    logger.warning("%s: %s. Raise --max_length, or leave these rows out with --drop_long_rows", said, harm)
    return rows


def _harm_of_cutting(rows: Dataset, long: Sequence[int], limit: int, keeps_end: bool, all_too_long: str) -> str:
    part = "text" if is_text(rows[0]) else "answer"
    kept = slice(-limit, None) if keeps_end else slice(limit)
    empty = sum(not _is_learned(labels[kept]) for labels in rows.select(long)["labels"])
    if empty == len(rows):
        raise ValueError(f"--max_length {limit} leaves no token of the {part} in any of {all_too_long}")
    lost = "start of the row" if keeps_end else f"end of the {part}"
    emptied = f"; {empty:,} of them lose all of the {part} and count for nothing" if empty else ""
    return f"they are cut there, and the {lost} is lost{emptied}"


def _is_learned(labels: Sequence[int]) -> bool:
    return any(label != IGNORED for label in labels)
