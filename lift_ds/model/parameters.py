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

from lift_ds.index.encoding import CompactIndex, IndexLayout, encode


class IndexWords(nn.Parameter):
    """The words of an index. They are a parameter, so that ZeRO-3 shards them; whole numbers have no gradients."""

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> IndexWords:
        """Refuse what would be for all parameters of the model: LIFT has chosen which ones are trained."""
        if requires_grad:
            raise ValueError(
                "requires_grad was turned on for all parameters of a model that LIFT is attached to; do that before "
                "lift_ds.attach, which chooses what is trained (extra_trainable names more)"
            )
        return self


class PrincipalIndex(nn.Module):
    """I, the flat row-major positions of the principal values of one matrix; calling it gives its words, whole.

    Whoever shards the words makes them whole around the call: ZeRO-3 by its own hooks, `zero.sharded_index` in stages
    1 and 2.

    Args:
        index: int [k], ascending; a union of whole blocks.
        rows: m.
        columns: n.
        block_shape: (p, q), which divide m and n.
    """

    words: nn.Parameter  # int32, frozen

    def __init__(self, index: Tensor, rows: int, columns: int, block_shape: tuple[int, int] = (1, 1)) -> None:
        super().__init__()
        self.layout = IndexLayout(rows, columns, index.numel(), block_shape)
        self.words = IndexWords(self.encode(index), requires_grad=False)

    def forward(self) -> Tensor:
        # A tensor, not a CompactIndex: the hooks of ZeRO-3 walk through what a module returns.
        return self.words.detach()

    @property
    def entries(self) -> int:
        """k, wherever the words are."""
        return self.layout.entries

    def compact(self) -> CompactIndex:
        """Return the index as it is stored; the words are whole."""
        return CompactIndex(self.words.detach(), self.layout)

    def positions(self) -> Tensor:
        """Return I, int32 [k], ascending; the words are whole."""
        return self.compact().positions()

    def decode(self, words: Tensor) -> Tensor:
        """Return the positions, int32 [k], that words of this matrix stand for."""
        return CompactIndex(words, self.layout).positions()

    def word_count(self) -> int:
        """Return how many words the index has when it is whole."""
        return self.layout.word_count()

    def encode(self, index: Tensor) -> Tensor:
        """Return another index of this matrix as words; on the meta device by their number alone."""
        if index.is_meta:
            return index.new_empty(self.layout.word_count(), dtype=torch.int32)
        return encode(index, self.layout.rows, self.layout.columns, self.layout.block_shape)


class PrincipalSet(nn.Module):
    """θ [k] (trainable) and I of one matrix.

    Args:
        values: floating [k], the weights at `index`.
        index: int [k], ascending.
        rows: m.
        columns: n.
        block_shape: (p, q), of the blocks the index is made of.
    """

    values: nn.Parameter
    index: PrincipalIndex

    def __init__(
        self, values: Tensor, index: Tensor, rows: int, columns: int, block_shape: tuple[int, int] = (1, 1)
    ) -> None:
        super().__init__()
        self.values = nn.Parameter(values)
        self.index = PrincipalIndex(index, rows, columns, block_shape)

    def for_autograd(self) -> nn.Parameter:
        """Return θ in its logical shape, to be an input of a node of autograd.

        Autograd compares the gradient with the shape of θ and reads no value. Where ZeRO-3 has left θ empty it
        becomes a view of one element, so that it need not be gathered.
        """
        # Not by attribute: within a forward ZeRO-3 gathers what an attribute finds empty, then always.
        values = next(self.parameters(recurse=False))
        if values.numel() != self.index.entries:
            values.data = torch.empty(1, dtype=values.dtype, device=values.device).expand(self.index.entries)
        return values

    def is_whole(self) -> bool:
        """Tell whether θ holds its values on this rank at this moment."""
        return self.values.is_contiguous() and self.values.numel() == self.index.entries
