"""Mean absolute gradients of whole weight matrices, by which the criterion "gradient" selects.

Backward forms dL/dW of one weight after the other anyway, and drops it. Here it is kept, in absolute value and added up
over the batches, for a few matrices at a time: by default for as many as have no more entries than the largest one.
The batches run through the model once for each such group, so this takes little memory and much time.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lift_ds.model.weights import PrincipalMatrix, PrincipalWeight
from lift_ds.runtime import watchdog

#: One batch: what the model is called with, by name.
Batch = Mapping[str, Any]

#: Gives the loss of a model on a batch, a tensor [].
Loss = Callable[[nn.Module, Batch], Tensor]


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss that a model of transformers computes by itself from a batch with labels."""
    loss: Tensor | None = model(**batch).loss
    if loss is None:
        raise ValueError("the model gives no loss for a batch; add labels to the batches, or give a loss")
    return loss


class GradientMeter:
    """Measures mean |dL/dW| of managed matrices on some batches.

    Args:
        model: with LIFT attached.
        batches: that are gone through, the same ones on every rank.
        loss: of the model on a batch.
        seed: of what is random in the model meanwhile, such as dropout.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], loss: Loss, seed: int) -> None:
        self._model = model
        self._batches = batches
        self._loss = loss
        self._seed = seed
        self._totals: dict[PrincipalWeight, dict[int, Tensor]] | None = None  # while measuring

    @property
    def measures(self) -> bool:
        """Whether gradients are measured at this moment; then nothing is trained."""
        return self._totals is not None

    @property
    def is_empty(self) -> bool:
        """Whether there are no batches."""
        return not self._batches

    def measure(
        self,
        wanted: Mapping[str, PrincipalMatrix],
        everything: Iterable[PrincipalWeight],
        in_step: bool,
        end_backward: Callable[[Iterable[PrincipalWeight]], None],
    ) -> dict[str, Tensor]:
        """Measure some matrices.

        Args:
            wanted: name -> matrix, those of a group on this rank; may be none.
            everything: all managed weights.
            in_step: whether all ranks have to go through the whole model together, as in ZeRO-3, where its parts are
                gathered on the way. Else each goes as far down as its own matrices, and no collective runs.
            end_backward: called after each backward, with the weights that it went through for.

        Returns:
            Name -> mean |dL/dW|, float32 [m, n], on the device of the weight.
        """
        if not wanted and not in_step:
            return {}
        passed = list(everything) if in_step else list(dict.fromkeys(weight for weight, _ in wanted.values()))
        self._totals = {weight: {} for weight, _ in wanted.values()}
        for weight, number in wanted.values():
            self._totals[weight][number] = torch.zeros(weight.shape(), device=weight.principal_values.device)
        try:
            with _random_numbers_apart(), torch.enable_grad(), watchdog.during("measuring gradients"):
                torch.manual_seed(self._seed)
                for batch in self._batches:
                    # Not `backward`: the gradients of θ are zeros here, and nobody is to reduce or keep them.
                    loss = self._loss(self._model, batch)
                    torch.autograd.grad(loss, [one.principal.values for one in passed], allow_unused=True)
                    end_backward(passed)
                    del loss  # and what the layers that were not reached have kept for it
            return {
                name: self._totals[weight][number].div_(len(self._batches)) for name, (weight, number) in wanted.items()
            }
        finally:
            self._totals = None

    def wants(self, weight: PrincipalWeight) -> bool:
        """Tell whether gradients of a weight are measured at this moment."""
        return self._totals is not None and weight in self._totals

    def add(self, weight: PrincipalWeight, start: int, magnitudes: Tensor) -> None:
        """Add |dL/dW| of a part of a weight to what is measured of it.

        Args:
            weight: of which some matrices may be wanted.
            start: flat position of the first entry of the part, in one matrix or at the beginning of one.
            magnitudes: 1-D; a part of one matrix, or whole ones.
        """
        size = weight.shape().numel()
        for number, total in (self._totals or {}).get(weight, {}).items():
            first, last = max(start, number * size), min(start + magnitudes.numel(), (number + 1) * size)
            if first < last:
                total.view(-1)[first - number * size : last - number * size] += magnitudes[first - start : last - start]

    def checksum(self) -> int:
        """Return a number that differs where the batches do."""
        found = 0
        for batch in self._batches:
            for name in sorted(batch):
                if isinstance(batch[name], Tensor):
                    data = batch[name].detach().cpu().contiguous().view(-1).view(torch.uint8)
                    found = zlib.crc32(data.numpy(), found)
        return found


def _random_numbers_apart() -> AbstractContextManager[None]:
    """Leave the random numbers of the host and of this rank's accelerator as they were."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[torch.accelerator.current_device_index()], device_type=accelerator.type)


def groups_of(entries: Sequence[int], most: int) -> list[slice]:
    """Cut a sequence of matrices into runs of at most `most` entries together, each of at least one matrix.

    Args:
        entries: of each matrix.
        most: of a run.
    """
    ends, held = [0], 0
    for place, count in enumerate(entries):
        if held and held + count > most:
            ends.append(place)
            held = 0
        held += count
    return [slice(start, stop) for start, stop in itertools.pairwise([*ends, len(entries)])] if entries else []
