"""What a managed weight gains: its principal values θ and their index I, in modules of their own.

    module                       weight W [m, n], bias     used in forward and in backward
    module.principal             values θ [k]              never called: needed after the step only
    module.principal.index       words, I stored           called in backward, once

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
    """I, the flat row-major positions of the principal values of a weight; calling it gives its words, whole.

    Whoever shards the words makes them whole around the call: ZeRO-3 by its own hooks, `zero.sharded_index` in stages
    1 and 2.

    Args:
        words: I as it is stored, int32 [layout.word_count()].
        layout: what the words mean.
    """

    words: nn.Parameter  # int32, frozen

    def __init__(self, words: Tensor, layout: IndexLayout) -> None:
        super().__init__()
        self.layout = layout
        self.words = IndexWords(words, requires_grad=False)

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
        """Return I [k], ascending; the words are whole."""
        return self.compact().positions()

    def word_count(self) -> int:
        """Return how many words the index has when it is whole."""
        return self.layout.word_count()

    def encode(self, index: Tensor) -> Tensor:
        """Return another index of this matrix, or of one of this stack, as words."""
        one = self.layout.of_one
        return encode(index, one.rows, one.columns, one.block_shape)


class PrincipalSet(nn.Module):
    """θ [k] (trainable) and I of one weight.

    Args:
        values: floating [k], the weights at I.
        words: I as it is stored, int32 [layout.word_count()].
        layout: what the words mean.
    """

    values: nn.Parameter
    index: PrincipalIndex

    def __init__(self, values: Tensor, words: Tensor, layout: IndexLayout) -> None:
        super().__init__()
        self.values = nn.Parameter(values)
        self.index = PrincipalIndex(words, layout)

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
