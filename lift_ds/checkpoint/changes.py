"""What training has changed (`lift_ds.refresh.changes`), as files of a checkpoint.

    NAME/base, NAME/base/positions    entries of a weight that were ever trained, and what they were before
    NAME/left, NAME/left/positions    entries that have left its selection, and the number of the refresh they left at
    NAME/dense, NAME/dense/start      a parameter that is trained in full, before training

Positions are those in the whole weight, so that a rank finds what belongs to it on another number of ranks. Where each
rank has all weights (ZeRO 0 to 2), rank 0 writes all. The texts of the file have the refreshes of each weight.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lift_ds.checkpoint import rank_files
from lift_ds.model.attachment import Attachment, require_attachment
from lift_ds.refresh.changes import Changes, Left
from lift_ds.refresh.entries import Entries, Part
from lift_ds.runtime.ranks import rank_and_count

_SINCE, _STEPS = "left_since", "left_steps"


def write(model: nn.Module, directory: rank_files.Folder) -> None:
    """Write this rank's record into a checkpoint folder; no file where it has none.

    Args:
        model: the model LIFT is attached to.
        directory: an existing folder.

    Raises:
        OSError: when the file cannot be written.
    """
    attachment = require_attachment(model)
    driver = attachment.driver
    tensors, texts = {}, {}
    if driver is not None and (driver.store.sharded or rank_and_count()[0] == 0):
        tensors, texts = dict(_tensors(attachment, driver.changes)), _texts(driver.changes)
    rank_files.write(rank_files.CHANGES, directory, tensors, texts)


def _tensors(attachment: Attachment, changes: Changes) -> Iterator[tuple[str, Tensor]]:
    records = {"base": changes.base or {}, "left": {name: left.entries for name, left in (changes.left or {}).items()}}
    for kind, of_weights in records.items():
        for name, entries in of_weights.items():
            if attachment.driver.store.has_first_copy(attachment.weights[name]):
                yield f"{name}/{kind}", entries.numbers.contiguous()
                yield f"{name}/{kind}/positions", entries.positions()
    for name, (piece, start) in changes.dense.items():
        yield f"{name}/dense", piece
        yield f"{name}/dense/start", torch.tensor(start)


def _texts(changes: Changes) -> dict[str, str]:
    if changes.left is None:
        return {}
    return {
        _SINCE: str(changes.left_since),
        _STEPS: json.dumps({name: left.steps for name, left in changes.left.items()}),
    }


def restore(model: nn.Module, directory: rank_files.Folder) -> None:
    """Take this rank's record out of a checkpoint folder, and forget the one it has.

    What is not asked for any more stays behind. No collective runs.

    Args:
        model: the model LIFT is attached to, its optimizer bound.
        directory: a verified checkpoint.
    """
    attachment = require_attachment(model)
    changes: Changes = attachment.driver.changes
    changes.forget()
    with ExitStack() as opened:
        files = [
            opened.enter_context(safe_open(path, framework="pt"))
            for path in rank_files.paths(rank_files.CHANGES, directory)
        ]
        if not files:
            return
        changes.begun = True
        _restore_base(attachment, changes, files)
        _restore_left(attachment, changes, files)


def _restore_base(attachment: Attachment, changes: Changes, files: list[Any]) -> None:
    kept = any(key.endswith("/base") for key in files[0].keys())  # noqa: SIM118  # no mapping
    if not (attachment.config.keep_base and kept):
        return
    changes.base = {}
    for name, weight in attachment.weights.items():
        part, device = changes.part_of(weight)
        changes.base[name] = _entries(files, f"{name}/base", part, weight.weight.dtype, device)
    for name, parameter in attachment.dense.items():
        with attachment.driver.store.held(parameter, write=False) as (piece, start):
            changes.dense[name] = (_dense(files, f"{name}/dense", torch.empty_like(piece), start), start)


def _restore_left(attachment: Attachment, changes: Changes, files: list[Any]) -> None:
    if not attachment.config.track_changes:
        return
    texts, changes.left = files[0].metadata() or {}, {}
    if _SINCE not in texts:  # from now on
        changes.left_since = attachment.driver.applied_steps
        return
    changes.left_since = int(texts[_SINCE])
    for name, steps in json.loads(texts[_STEPS]).items():
        part, device = changes.part_of(attachment.weights[name])
        changes.left[name] = Left(_entries(files, f"{name}/left", part, torch.int16, device), steps)


def _entries(files: list[Any], key: str, part: Part, dtype: torch.dtype, device: torch.device) -> Entries:
    """Read the entries in a part of a weight, which may be in the files of several ranks."""
    found: list[tuple[Tensor, Tensor]] = []
    for file in files:
        if f"{key}/positions" not in file.keys():  # noqa: SIM118  # no mapping
            continue
        places = file.get_slice(f"{key}/positions")
        count = places.get_shape()[0]
        if count and int(places[0:1]) < part.stop and int(places[count - 1 : count]) >= part.start:
            positions = places[0:count]
            own = (positions >= part.start) & (positions < part.stop)
            found.append((positions[own], file.get_tensor(key)[own]))
    found.sort(key=lambda one: int(one[0][0]) if one[0].numel() else 0)
    whole = torch.int64 if part.long else torch.int32
    positions = torch.cat([torch.empty(0, dtype=whole), *(positions for positions, _ in found)])
    numbers = torch.cat([torch.empty(0, dtype=dtype), *(numbers for _, numbers in found)])
    return Entries.of(part, positions.to(device), numbers.to(device, dtype))


def _dense(files: list[Any], key: str, piece: Tensor, start: int) -> Tensor:
    """Read a part of a parameter that is trained in full, into a piece that begins at a flat position."""
    for file in files:
        if key not in file.keys():  # noqa: SIM118  # no mapping
            continue
        values, first = file.get_slice(key), int(file.get_tensor(f"{key}/start"))
        begin, end = max(start, first), min(start + piece.numel(), first + values.get_shape()[0])
        if begin < end:
            piece[begin - start : end - start].copy_(values[begin - first : end - first])
    return piece
