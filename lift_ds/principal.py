"""What a managed layer gains: its principal values θ and their index I, in modules of their own.

    layer                        weight W [m, n], bias     used in forward and in backward
    layer.principal              values θ [k]              never called: needed after the step only
    layer.principal.index        words, I stored           called in backward, once

ZeRO-3 fetches the parameters of a module when that module is called. Kept apart, θ crosses the network only to be
written back, and I only for backward and for that.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lift_ds.selection.encoding import decode, encode, word_count


class PrincipalIndex(nn.Module):
    """I, the flat row-major positions of the principal values of one matrix; calling it gives them.

    Whoever shards the words makes them whole around the call: ZeRO-3 by its own hooks, `zero.sharded_index` in stages
    1 and 2.

    Args:
        index: int [k], ascending.
        rows: m.
        columns: n.
    """

    words: nn.Parameter  # int32, frozen

    def __init__(self, index: Tensor, rows: int, columns: int) -> None:
        super().__init__()
        self.rows, self.columns, self.entries = rows, columns, index.numel()
        self.words = nn.Parameter(self.encode(index), requires_grad=False)

    def forward(self) -> Tensor:
        return self.positions()

    def positions(self) -> Tensor:
        """Return I, int32 [k], ascending; the words are whole."""
        return self.decode(self.words.detach())

    def decode(self, words: Tensor) -> Tensor:
        """Return the positions, int32 [k], that words of this matrix stand for."""
        return decode(words, self.rows, self.columns, self.entries)

    def word_count(self) -> int:
        """Return how many words the index has when it is whole."""
        return word_count(self.rows, self.columns, self.entries)

    def encode(self, index: Tensor) -> Tensor:
        """Return another index of this matrix as words."""
        return encode(index, self.rows, self.columns)


class PrincipalSet(nn.Module):
    """θ [k] (trainable) and I of one matrix.

    Args:
        values: floating [k], the weights at `index`.
        index: int [k], ascending.
        rows: m.
        columns: n.
    """

    values: nn.Parameter
    index: PrincipalIndex

    def __init__(self, values: Tensor, index: Tensor, rows: int, columns: int) -> None:
        super().__init__()
        self.values = nn.Parameter(values)
        self.index = PrincipalIndex(index, rows, columns)

    def for_autograd(self) -> nn.Parameter:
        """Return θ in its logical shape, to be an input of a node of autograd.

        Autograd compares the gradient with the shape of θ and reads no value. Where ZeRO-3 has left θ empty it
        becomes a view of one element, so that it need not be gathered.
        """
        values = self.values
        if values.numel() != self.index.entries:
            values.data = torch.empty(1, dtype=values.dtype, device=values.device).expand(self.index.entries)
        return values

    def is_whole(self) -> bool:
        """Tell whether θ holds its values on this rank at this moment."""
        return self.values.is_contiguous() and self.values.numel() == self.index.entries
