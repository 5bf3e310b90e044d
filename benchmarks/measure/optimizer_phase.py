"""The optimizer phase alone: from a dense gradient in memory to updated weights, for several ways to train.

    dense       AdamW, fused, over the whole matrix; with bf16 weights over float32 master values, which are copied back
    lift        the principal index: gather, Adam over those, write-back; the functions that training calls
    masks       the entries of a boolean mask: gradient[mask], fused Adam over those, weight[mask] = new
    published   what the optimizer published with LIFT does with its masks: gradient[mask], Adam by one operator after
                the other, gradient[mask] = update, gradient[~mask] = 0, and the whole gradient is added to the weight

All but the first train the same entries. The gradient lies in memory as a whole; in training LIFT gathers from a tile
that was formed just before and is still in the cache, which this does not credit it with.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure.clock import Clock
from benchmarks.measure.records import Record
from lift_ds.index.access import access_to
from lift_ds.index.encoding import CompactIndex, IndexLayout, encode
from lift_ds.refresh.store import put_values

#: The order in which the methods alternate.
METHODS = ("dense", "lift", "masks", "published")

_CACHE_LINE = 64

_LR, _BETAS, _EPS = 1e-4, (0.9, 0.95), 1e-8


class Matrices:
    """Some weights and their gradients, and the optimizers of the three methods over them.

    Args:
        shapes: [m, n] of each.
        density: share that masks and LIFT train.
        dtype: of weights and gradients.
        device: where.
    """

    def __init__(self, shapes: list[tuple[int, int]], density: float, dtype: torch.dtype, device: str) -> None:
        torch.manual_seed(1)
        self.device = torch.device(device)
        self.weights = [(torch.randn(shape, device=device) * 0.02).to(dtype) for shape in shapes]
        self.gradients = [(torch.randn(shape, device=device) * 1e-3).to(dtype) for shape in shapes]
        self.indices = [_random_index(shape, density, device) for shape in shapes]
        self.masks = [_mask(index) for index in self.indices]
        self.values = {name: [self._trained(i, name) for i in range(len(shapes))] for name in METHODS}
        self.optimizers = {
            name: torch.optim.AdamW(values, lr=_LR, betas=_BETAS, weight_decay=0.0, fused=True)
            for name, values in self.values.items()
        }
        # Of the published optimizer, which has no master values: moments in the dtype of the gradient, and its update.
        self.moments = [torch.zeros(2, index.layout.entries, dtype=dtype, device=device) for index in self.indices]
        self.compressed: list[Tensor] = []

    def _trained(self, which: int, method: str) -> torch.nn.Parameter:
        weight = self.weights[which]
        values = weight if method == "dense" else weight[self.masks[which]]
        # In float32 the dense optimizer updates the weights themselves; in bf16 everything has float32 master values.
        return torch.nn.Parameter(values.float())

    def run(self, method: str) -> None:
        """Do one optimizer phase."""
        for part in self.parts(method):
            part()

    def parts(self, method: str) -> list[Callable[[], None]]:
        """Return gather, Adam and write-back of a method."""
        step: Any = self.optimizers[method].step
        return {
            "dense": [self._take_dense, step, self._put_dense],
            "masks": [self._take_masked, step, self._put_masked],
            "lift": [self._take_principal, step, self._put_principal],
            "published": [self._take_published, self._step_published, self._put_published],
        }[method]

    def _take_dense(self) -> None:
        for values, gradient in zip(self.values["dense"], self.gradients, strict=True):
            values.grad = gradient.float()

    def _put_dense(self) -> None:
        for values, weight in zip(self.values["dense"], self.weights, strict=True):
            if weight.dtype != torch.float32:
                weight.copy_(values.detach())

    def _take_masked(self) -> None:
        for values, gradient, mask in zip(self.values["masks"], self.gradients, self.masks, strict=True):
            values.grad = gradient[mask].float()

    def _put_masked(self) -> None:
        for values, weight, mask in zip(self.values["masks"], self.weights, self.masks, strict=True):
            weight[mask] = values.detach().to(weight.dtype)

    def _take_principal(self) -> None:
        for values, gradient, index in zip(self.values["lift"], self.gradients, self.indices, strict=True):
            values.grad = torch.empty_like(values)  # the backward of a layer gathers in the dtype of θ, too
            access_to(index).gather(gradient.view(-1), 0, values.grad)

    def _put_principal(self) -> None:
        for values, weight, index in zip(self.values["lift"], self.weights, self.indices, strict=True):
            put_values(weight, index, values)

    def _take_published(self) -> None:
        self.compressed = [gradient[mask] for gradient, mask in zip(self.gradients, self.masks, strict=True)]

    def _step_published(self) -> None:
        first, second = _BETAS
        for which, gradient in enumerate(self.compressed):
            exp_avg, exp_avg_sq = self.moments[which]
            exp_avg.mul_(first).add_(gradient, alpha=1 - first)
            exp_avg_sq.mul_(second).addcmul_(gradient, gradient, value=1 - second)
            self.compressed[which] = exp_avg / exp_avg_sq.sqrt().add_(_EPS)

    def _put_published(self) -> None:
        for weight, gradient, mask, update in zip(
            self.weights, self.gradients, self.masks, self.compressed, strict=True
        ):
            gradient[mask] = update
            gradient[~mask] = 0
            weight.add_(gradient, alpha=-_LR)

    def bytes_touched(self) -> int:
        """Return the bytes of cache lines that any method has to move that trains these entries.

        Of the gradient the lines with an entry are read, of the weight read and written; of θ and its two moments all
        is read and written, its gradient read; the index is read twice.
        """
        found = 0
        for weight, index, values in zip(self.weights, self.indices, self.values["lift"], strict=True):
            lines = (index.positions().long() * weight.element_size() // _CACHE_LINE).unique().numel()
            found += 3 * _CACHE_LINE * lines + 7 * 4 * values.numel() + 2 * 4 * index.words.numel()
        return found


def _random_index(shape: tuple[int, int], density: float, device: str) -> CompactIndex:
    rows, columns = shape
    k = round(density * rows * columns)
    positions = torch.randperm(rows * columns, device=device)[:k].sort().values
    return CompactIndex(encode(positions, rows, columns), IndexLayout(rows, columns, k))


def _mask(index: CompactIndex) -> Tensor:
    mask = torch.zeros(index.layout.rows * index.layout.columns, dtype=torch.bool, device=index.words.device)
    mask[index.positions().long()] = True
    return mask.view(index.layout.rows, index.layout.columns)


def measure(
    name: str, shapes: list[tuple[int, int]], density: float, dtype: torch.dtype, device: str, rounds: int
) -> Record:
    """Time the methods in turn, round after round.

    Args:
        name: of the case, for the table.
        shapes: of the matrices.
        density: share that is trained.
        dtype: of weights and gradients.
        device: "cpu" or "cuda".
        rounds: how often each method runs.

    Returns:
        Milliseconds of each method, each round; medians; the median over the rounds of what LIFT took against each; and
        the bytes that LIFT has to move, with the milliseconds in which the memory moves as many.
    """
    matrices = Matrices(shapes, density, dtype, device)
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    parts: list[list[float]] = []
    for round_ in range(rounds + 2):
        for method in METHODS:
            spent = _time_parts(matrices, method)
            if round_ >= 2:
                times[method].append(sum(spent))
                if method == "lift":
                    parts.append(spent)
    against = {
        method: statistics.median(lift / other for lift, other in zip(times["lift"], times[method], strict=True))
        for method in METHODS
    }
    return {
        "name": name,
        "shapes": shapes,
        "dtype": str(dtype).removeprefix("torch."),
        "density": density,
        "entries": sum(values.numel() for values in matrices.values["lift"]),
        "milliseconds": {method: statistics.median(spent) for method, spent in times.items()},
        # The fastest round shows what a method takes where nothing else runs on the cores.
        "best": {method: min(spent) for method, spent in times.items()},
        "all": times,
        "lift_parts": [statistics.median(part) for part in zip(*parts, strict=True)],
        "lift_against": against,
        "bytes": matrices.bytes_touched(),
        "limit": 1e3 * matrices.bytes_touched() / _bandwidth(matrices),
    }


def _time_parts(matrices: Matrices, method: str) -> list[float]:
    """Return the milliseconds of gather, Adam and write-back."""
    clock = Clock(matrices.device)
    clock.mark()
    for part in matrices.parts(method):
        part()
        clock.mark()
    return [1e3 * seconds for seconds in clock.seconds()]


def _bandwidth(matrices: Matrices) -> float:
    """Return bytes a second of memory, read and written in place; the best of some passes over the largest gradient."""
    tensor = max(matrices.gradients, key=Tensor.numel).float()
    clock = Clock(matrices.device)
    clock.mark()
    for _ in range(7):
        tensor.mul_(1.0)
        clock.mark()
    return 2 * tensor.nbytes / min(clock.seconds())
