"""What a refresh does to the state of training: an entry that stays keeps it, a new one starts with zero moments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Adam's two moments, as torch and DeepSpeed call them in the state of an optimizer.
EXP_AVG, EXP_AVG_SQ = MOMENTS = ("exp_avg", "exp_avg_sq")


class PrincipalState(NamedTuple):
    """The training state of the principal values of one matrix, each float32 [k]."""

    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


@torch.no_grad()
def carry_over(
    old_index: Tensor, state: PrincipalState, new_index: Tensor, current: Tensor
) -> tuple[PrincipalState, int]:
    """Carry master values and moments from one selection to the next (Algorithm 1, refresh).

    An entry that stays selected keeps its master value and moments; a new one starts from its current
    weight and zero moments.

    Args:
        old_index: int [k], ascending, the selection `state` belongs to.
        state: tensors [k] in the order of `old_index`.
        new_index: int [k], ascending.
        current: [k], the current weights at `new_index`.

    Returns:
        The state in the order of `new_index`, and how many entries are new.
    """
    place = torch.searchsorted(old_index, new_index).clamp_(max=old_index.numel() - 1)  # [k]
    survives = old_index[place] == new_index  # [k]
    carried = PrincipalState(
        master=torch.where(survives, state.master[place], current.to(state.master.dtype)),
        exp_avg=torch.where(survives, state.exp_avg[place], 0.0),
        exp_avg_sq=torch.where(survives, state.exp_avg_sq[place], 0.0),
    )
    return carried, new_index.numel() - int(survives.sum())
