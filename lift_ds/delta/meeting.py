"""What becomes of a tensor that deltas change: of one delta, or of several that may meet in an entry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lift_ds.delta.tensors import bits_of, pieces_of

#: What is done where deltas give an entry different values: refuse, take the last one's, take their mean.
ON_CONFLICT = ("error", "last", "mean")

#: Flat positions, ascending, or None for all; and the values there.
Entries = tuple[Tensor | None, Tensor]


@dataclass
class Conflicts:
    """Entries to which deltas give different values."""

    entries: int = 0
    largest: float = 0.0  # difference between two values of an entry


def apply_entries(
    base: Tensor | None, changes: Sequence[Entries], rule: str, shape: Sequence[int]
) -> tuple[Tensor, Conflicts]:
    """Return a tensor with the changes of deltas in it.

    It is worked through in pieces, so that beside the tensors only little is held.

    Args:
        base: the tensor of the base; None where it has none, so that each change is of all entries.
        changes: of each delta that changes it, in their order.
        rule: one of ON_CONFLICT. By "error", entries in conflict get the last one's value, and are counted.
        shape: of the tensor.

    Returns:
        The tensor, and what was in conflict. Entries to which all give the same bits are not.
    """
    dtype = changes[0][1].dtype
    result = torch.empty(tuple(shape), dtype=dtype)
    flat, conflicts = result.reshape(-1), Conflicts()
    before = None if base is None else base.reshape(-1)
    for piece in pieces_of(flat.numel()):
        old = None if before is None else before[piece]
        parts = [_in_piece(old, change, piece) for change in changes]
        if old is not None:
            flat[piece] = old
        if len(parts) == 1:
            bits_of(flat[piece])[parts[0][0]] = bits_of(parts[0][1])
        else:
            _meet(flat[piece], parts, rule, conflicts)
    return result, conflicts


def _in_piece(old: Tensor | None, change: Entries, piece: slice) -> tuple[Tensor, Tensor]:
    """Return positions within a piece, and values there, of what a delta changes in it."""
    indices, values = change
    if indices is not None:
        bounds = torch.tensor([piece.start, piece.stop], dtype=indices.dtype)
        first, last = torch.searchsorted(indices, bounds).tolist()
        return indices[first:last].long() - piece.start, values[first:last]
    new = values[piece]
    if old is None:
        return torch.arange(len(new)), new
    positions = (bits_of(old) != bits_of(new)).nonzero().reshape(-1)
    return positions, bits_of(new)[positions].view(new.dtype)


def _meet(result: Tensor, parts: Sequence[tuple[Tensor, Tensor]], rule: str, conflicts: Conflicts) -> None:
    """Put what several deltas change into a piece, in place."""
    bits = bits_of(result)  # what of some dtypes cannot be indexed can so be written
    wide = torch.float64 if result.dtype == torch.float64 else torch.float32
    given = torch.zeros(len(result), dtype=torch.int32)  # by how many deltas
    differs = torch.zeros(len(result), dtype=torch.bool)
    total = torch.zeros(len(result), dtype=wide)
    lowest, highest = torch.full_like(total, torch.inf), torch.full_like(total, -torch.inf)
    for positions, values in parts:
        unlike = bits[positions] != bits_of(values)
        differs[positions] |= (given[positions] > 0) & unlike
        bits[positions] = bits_of(values)
        given[positions] += 1
        exact = values.to(wide)
        total[positions] += exact
        lowest[positions] = torch.minimum(lowest[positions], exact)
        highest[positions] = torch.maximum(highest[positions], exact)
    if differs.any():
        conflicts.entries += int(differs.sum())
        spread = highest[differs] - lowest[differs]
        conflicts.largest = max(conflicts.largest, spread.nan_to_num(torch.inf, torch.inf).max().item())
        if rule == "mean":
            bits[differs] = bits_of((total[differs] / given[differs]).to(result.dtype))
