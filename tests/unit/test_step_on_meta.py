"""Pins that a training step never waits for a device: forward, backward, the gather of θ's gradient, Adam, the
write-back and the count of steps run on tensors that have no data. To read one back, to copy it to the host or to mix
devices is an error there. What does read, before the first applied step, is pinned to the backwards in which it may.

All tensors are on torch's meta device, so the code takes the ways it takes on a device. torch's fused Adam has no form
for it; the one of lists of tensors stands for it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from cases import small_llama
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from lift_ds import LiftAdamW, LiftConfig
from lift_ds.index.access import access_to
from lift_ds.index.encoding import CompactIndex, IndexLayout
from lift_ds.index.kernels.torch_access import TorchAccess
from lift_ds.model import layers
from lift_ds.model.attach import dry_attach
from lift_ds.model.attachment import Attachment, require_attachment
from lift_ds.zero.sharded_index import ShardedIndex

META = torch.device("meta")


class Wide(nn.Module):
    """A layer whose index stores positions, since its columns do not fit into 16 bits; with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(70_000, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(x).square().mean()


def llama_loss(model: nn.Module) -> Tensor:
    tokens = torch.empty(2, 16, dtype=torch.int64, device=META)
    return model(input_ids=tokens, labels=tokens).loss


def wide_loss(model: nn.Module) -> Tensor:
    return model(torch.empty(2, 70_000, device=META))


def build(kind: str, **settings: Any) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A model on the meta device with LIFT attached, and what gives its loss."""
    with META:
        model = Wide() if kind == "wide" else small_llama(torch.bfloat16)
    config = LiftConfig(density=0.1, lra_rank=4, target_modules=["wide"] if kind == "wide" else None, **settings)
    return dry_attach(model, config), wide_loss if kind == "wide" else llama_loss


def optimizer_for(model: nn.Module) -> LiftAdamW:
    optimizer = LiftAdamW(model)
    for group in optimizer.param_groups:
        group.update(fused=False, foreach=True)
    return optimizer


def in_training(model: nn.Module) -> Attachment:
    """Let a model be one whose first step has been applied."""
    attachment = require_attachment(model)
    attachment.step_seen = True
    return attachment


@pytest.mark.parametrize("tile", [2**24, 600], ids=["whole gradients", "tiles of gradients"])
@pytest.mark.parametrize(
    ("kind", "block_shape"), [("llama", (1, 1)), ("llama", (2, 4)), ("wide", (1, 1)), ("wide", (2, 1))], ids=str
)
def test_a_step_reads_nothing(
    kind: str, block_shape: tuple[int, int], tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "GRADIENT_TILE", tile)
    model, loss_of = build(kind, block_shape=block_shape)
    optimizer, attachment = optimizer_for(model), in_training(model)
    for step in range(1, 4):
        for _ in range(2):  # micro-batches
            loss_of(model).backward()
        assert attachment.reached == set(attachment.weights.values())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for layer in attachment.weights.values():
            gradient = layer.principal_values.grad
            assert gradient is not None
            assert (gradient.device, gradient.shape) == (META, (layer.entries(),))
            assert layer.weight.grad is None
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.driver is not None
        assert optimizer.driver.applied_steps == step


@pytest.mark.parametrize(
    "read",
    [
        lambda gradient: gradient.sum().item(),
        lambda gradient: bool(gradient.isnan().any()),
        lambda gradient: gradient.cpu(),
        lambda gradient: gradient[gradient > 0],
        lambda gradient: gradient + torch.ones(gradient.shape),
    ],
    ids=["item", "bool", "copy", "mask", "another device"],
)
def test_a_read_in_a_step_is_noticed(read: Callable[[Tensor], Any]) -> None:
    """Guards the test above."""
    model, loss_of = build("llama")
    optimizer_for(model)
    attachment = in_training(model)

    def hook(gradient: Tensor) -> None:
        read(gradient)

    next(iter(attachment.weights.values())).principal_values.register_hook(hook)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"meta|unimplemented"):
        loss_of(model).backward()


def test_before_the_first_applied_step_some_backwards_read() -> None:
    """Backwards of layers number 1, 2, 4, ... compare weights and principal values, which has no form without data."""
    model, loss_of = build("wide")
    optimizer = optimizer_for(model)
    attachment = require_attachment(model)
    reading = []
    for number in range(1, 20):
        try:
            loss_of(model).backward()
        except NotImplementedError:
            reading.append(number)
    assert reading == [1, 2, 4, 8, 16]
    assert not attachment.step_seen
    optimizer.step()
    assert attachment.step_seen
    for _ in range(20):
        loss_of(model).backward()


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """torch's fake process group stands for the other rank."""
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    deepspeed.init_distributed("fake", auto_mpi_discovery=False, verbose=False)
    yield
    dist.destroy_process_group()
    deepspeed.comm.comm.cdb = None


@pytest.mark.usefixtures("two_ranks")
def test_a_step_with_a_sharded_index_reads_nothing() -> None:
    """From the second step on; in the first the ranks compare the order of their layers."""
    model, loss_of = build("llama")
    optimizer, attachment = optimizer_for(model), in_training(model)
    indices = {name: layer.principal.index for name, layer in attachment.weights.items()}
    sharded = ShardedIndex(indices, None, keep=lambda: True)
    with pytest.raises(NotImplementedError, match="meta"):
        loss_of(model).backward()
    sharded._first_step = False
    sharded.release_all()
    for _ in range(3):
        loss_of(model).backward()
        assert all(index.words.numel() == index.word_count() for index in indices.values())
        optimizer.step()
        optimizer.zero_grad()
        sharded.release_all()
        assert not any(index.words.numel() for index in indices.values())
    assert sharded._expected == [*reversed(indices.values())]


#: Rows, columns and blocks of the three forms of an index.
FORMS = {
    "narrow": (24, 40, (1, 1)),
    "wide": (3, 70_000, (1, 1)),
    "blocks": (24, 40, (2, 4)),
    "wide blocks": (4, 140_000, (2, 2)),
}


def index_of(form: str) -> tuple[CompactIndex, int]:
    """An index without data, and the size of its matrix."""
    rows, columns, block_shape = FORMS[form]
    layout = IndexLayout(rows, columns, 400, block_shape)
    words = torch.empty(layout.word_count(), dtype=torch.int32, device=META)
    return CompactIndex(words, layout), rows * columns


def pieces(size: int) -> list[tuple[int, int]]:
    """All of a matrix, a tile or a shard of it, and a shard without an entry."""
    return [(0, size), (0, size // 3), (size // 3, size), (size, size)]


@pytest.mark.parametrize("form", FORMS)
def test_torch_reaches_any_piece_without_a_read(form: str) -> None:
    index, size = index_of(form)
    assert isinstance(access_to(index), TorchAccess)
    for start, stop in pieces(size):
        for dtype in (torch.bfloat16, torch.float32):
            piece, values = torch.empty(stop - start, dtype=dtype, device=META), torch.empty(400, device=META)
            access_to(index).gather(piece, start, values)
            access_to(index).put(piece, start, values)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is for Linux alone")
@pytest.mark.parametrize("form", FORMS)
def test_triton_launches_for_any_piece_without_a_read(form: str) -> None:
    from lift_ds.index.kernels.triton_access import TritonAccess

    index, size = index_of(form)
    for start, stop in pieces(size):
        piece, values = torch.empty(stop - start, device=META), torch.empty(400, device=META)
        for gather in (True, False):
            launch = TritonAccess(index).launch(piece, start, values, gather=gather)
            assert launch.programs == -(-stop // FORMS[form][1]) - start // FORMS[form][1]
            assert all(not isinstance(argument, Tensor) or argument.is_meta for argument in launch.arguments)
