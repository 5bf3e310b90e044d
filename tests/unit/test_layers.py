"""The gradients of a managed layer are those of the plain layer: for its input, its bias, and for θ the entries of the
dense weight gradient at the principal index, also where that is formed a tile of rows at a time; and no dense
gradient is left behind.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

import lift_ds
from lift_ds.index.encoding import IndexLayout, encode
from lift_ds.model import layers
from lift_ds.model.kinds import managed_class
from lift_ds.model.layers import LiftLinear, PrincipalLayer
from lift_ds.model.parameters import PrincipalSet

IN, OUT = 10, 7
CONFIG = lift_ds.LiftConfig(density=0.3, lra_rank=2)

#: Kind of a plain layer -> class that manages it.
KINDS = {
    "linear": LiftLinear,
    "conv1d": managed_class(Conv1D, ("weight",)),
    "falcon": managed_class(FalconLinear, ("weight",)),
}


def plain_layer(kind: str, dtype: torch.dtype = torch.float64, bias: bool = True) -> nn.Module:
    torch.manual_seed(11)
    linear = {"linear": nn.Linear, "falcon": FalconLinear}
    layer: nn.Module = Conv1D(OUT, IN) if kind == "conv1d" else linear[kind](IN, OUT, bias=bias)
    nn.init.normal_(layer.weight)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer.to(dtype)


def managed_twin(plain: nn.Module, extra: tuple[str, ...] = ("bias",)) -> PrincipalLayer:
    """A managed layer with the weights of a plain one, ready to train."""
    layer = copy.deepcopy(plain)
    has_bias = getattr(plain, "bias", None) is not None
    model = nn.Sequential(layer)
    config = lift_ds.LiftConfig(density=0.3, lra_rank=2, extra_trainable=extra if has_bias else ())
    lift_ds.LiftAdamW(lift_ds.attach(model, config))
    assert isinstance(layer, PrincipalLayer)
    return layer


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, IN, generator=torch.Generator().manual_seed(12)).to(dtype).requires_grad_()


def objective(y: Tensor) -> Tensor:
    """A scalar whose gradient differs from output to output."""
    return (y.float() if y.dtype == torch.bfloat16 else y).sin().sum()


def principal_entries(gradient: Tensor | None, layer: PrincipalLayer) -> Tensor:
    assert gradient is not None
    return gradient.reshape(-1)[layer.lift_weight.principal_index.long()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leading", [(5,), (2, 3), (2, 3, 4), ()], ids=["2-D", "3-D", "4-D", "1-D"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_are_those_of_the_plain_layer(kind: str, leading: tuple[int, ...], dtype: torch.dtype) -> None:
    plain = plain_layer(kind, dtype)
    layer = managed_twin(plain)
    assert type(layer) is KINDS[kind]
    x, x_plain = inputs(*leading, dtype=dtype), inputs(*leading, dtype=dtype)
    objective(plain(x_plain)).backward()
    y = layer(x)
    objective(y).backward()

    # The same products, in another order at most: some 10 roundings of 1e-16 or 6e-8 each.
    tolerance = {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(y, plain(x_plain), **tolerance)
    torch.testing.assert_close(x.grad, x_plain.grad, **tolerance)
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad, **tolerance)
    expected = principal_entries(plain.weight.grad, layer)
    torch.testing.assert_close(layer.lift_weight.principal_values.grad, expected, **tolerance)
    assert expected.abs().min() > 0  # gradients that vanished would all be equal
    assert layer.weight.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind: str) -> None:
    layer = managed_twin(plain_layer(kind))
    x = inputs(4)
    # gradcheck's own tolerances: its differences of 1e-6 have errors near 1e-9 in float64.
    assert torch.autograd.gradcheck(lambda x, bias: layer(x), (x, layer.bias))
    objective(layer(x)).backward()
    assert layer.lift_weight.principal_values.grad is not None
    step = 1e-6
    for place, position in enumerate(layer.lift_weight.principal_index.tolist()):
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                layer.weight.view(-1)[position] += sign * step
                losses.append(objective(layer(x)).item())
                layer.weight.view(-1)[position] -= sign * step
        # Central differences: step² + 1e-16 / step, about 1e-9 at values of this size.
        difference = (losses[0] - losses[1]) / (2 * step)
        assert layer.lift_weight.principal_values.grad[place].item() == pytest.approx(difference, abs=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_added_up_over_micro_batches(kind: str) -> None:
    plain = plain_layer(kind)
    layer = managed_twin(plain)
    for model in (plain, layer):
        for part in inputs(6).detach().split(2):
            objective(model(part)).backward()
    expected = principal_entries(plain.weight.grad, layer)
    # Float64, three sums: as above.
    torch.testing.assert_close(layer.lift_weight.principal_values.grad, expected, rtol=1e-12, atol=1e-13)
    assert layer.weight.grad is None


def test_layer_without_bias() -> None:
    plain = plain_layer("linear", bias=False)
    layer = managed_twin(plain)
    x = inputs(3)
    objective(layer(x)).backward()
    objective(plain(x.detach())).backward()
    assert layer.bias is None
    # As above.
    expected = principal_entries(plain.weight.grad, layer)
    torch.testing.assert_close(layer.lift_weight.principal_values.grad, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_bias_is_trained_only_where_it_is_named(kind: str) -> None:
    frozen = managed_twin(plain_layer(kind), extra=())
    objective(frozen(inputs(3))).backward()
    assert frozen.bias is not None
    assert not frozen.bias.requires_grad
    assert frozen.bias.grad is None
    assert frozen.lift_weight.principal_values.grad is not None

    trained = managed_twin(plain_layer(kind), extra=("bias",))
    objective(trained(inputs(3))).backward()
    assert trained.bias is not None
    assert trained.bias.grad is not None


def test_input_that_needs_no_gradient() -> None:
    layer = managed_twin(plain_layer("linear"))
    x = inputs(3).detach()
    objective(layer(x)).backward()
    assert x.grad is None
    assert layer.lift_weight.principal_values.grad is not None


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_that_of_the_plain_layer(kind: str) -> None:
    plain = plain_layer(kind, torch.float32)
    layer = managed_twin(plain)
    with torch.no_grad():
        x = inputs(2, 3, dtype=torch.float32)
        y = layer(x)
        assert not y.requires_grad
        # The bias is added inside the product by the one, after it by the other: float32's 6e-8 of values near 10.
        torch.testing.assert_close(y, plain(x), rtol=1e-6, atol=1e-6)


# Not Falcon's: it adds a float32 bias after the product and leaves bf16 so.
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_autocast_gives_the_gradients_of_the_plain_layer_under_autocast(kind: str) -> None:
    plain = plain_layer(kind, torch.float32)
    layer = managed_twin(plain)
    x, x_plain = inputs(2, 3, dtype=torch.float32), inputs(2, 3, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, y_plain = layer(x), plain(x_plain)
        assert y.dtype == y_plain.dtype == torch.bfloat16
    objective(y).backward()
    objective(y_plain).backward()
    # bf16 has 4e-3; values near 10, sums of 10 of them (Conv1D rounds once more, before the bias is added).
    tolerance = {"rtol": 2e-2, "atol": 0.1}
    torch.testing.assert_close(y, y_plain, **tolerance)
    torch.testing.assert_close(x.grad, x_plain.grad, **tolerance)
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad, **tolerance)
    values = layer.lift_weight.principal_values
    assert values.grad is not None
    torch.testing.assert_close(values.grad, principal_entries(plain.weight.grad, layer), **tolerance)
    assert values.grad.dtype == values.dtype == torch.float32
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    # And it was bf16 that computed it: a float32 gradient would have more digits.
    assert torch.equal(values.grad, values.grad.bfloat16().float())


def test_bf16_weight_with_float32_values() -> None:
    plain = plain_layer("linear", torch.bfloat16)
    layer = managed_twin(plain)
    x = inputs(3, dtype=torch.bfloat16)
    objective(layer(x)).backward()
    objective(plain(x.detach())).backward()
    assert layer.lift_weight.principal_values.grad is not None
    assert layer.lift_weight.principal_values.grad.dtype == layer.lift_weight.principal_values.dtype == torch.float32
    # The same bf16 product; 4e-3 for another order of its sums.
    expected = principal_entries(plain.weight.grad, layer).float()
    torch.testing.assert_close(layer.lift_weight.principal_values.grad, expected, rtol=1e-2, atol=1e-2)


class _Block(nn.Module):
    """Two managed layers, run under activation checkpointing of one kind or none."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(13)
        self.first, self.second = nn.Linear(IN, 16), nn.Linear(16, IN)
        self.reentrant = reentrant
        self.forwards = 0

    def inner(self, x: Tensor) -> Tensor:
        self.forwards += 1
        return x + self.second(torch.tanh(self.first(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if self.reentrant is None else checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_activation_checkpointing_changes_no_bit(reentrant: bool, autocast: bool) -> None:
    gradients = []
    for kind in (None, reentrant):
        block = _Block(kind)
        lift_ds.LiftAdamW(lift_ds.attach(block, CONFIG))
        x = inputs(4, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = block(block(x))
        objective(y).backward()
        assert block.forwards == (2 if kind is None else 4), "nothing was recomputed"
        assert block.first.weight.grad is None
        gradients.append([x.grad, *(p.grad for p in block.parameters() if p.requires_grad)])
    assert len(gradients[0]) == 3
    for without, with_checkpointing in zip(*gradients, strict=True):
        assert without is not None
        assert torch.equal(without, with_checkpointing)  # recomputing repeats the same operations


def test_gradient_of_a_gradient_is_refused() -> None:
    layer = managed_twin(plain_layer("linear"))
    x = inputs(3)
    (first,) = torch.autograd.grad(objective(layer(x)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tile", [1, 11, 25, 40, 1000])
def test_gradient_by_tiles_of_rows_is_that_of_the_whole(kind: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of one row, of rows that do not divide the matrix, and one that holds it all."""
    plain = plain_layer(kind)
    layer = managed_twin(plain)
    objective(plain(inputs(5))).backward()
    monkeypatch.setattr(layers, "HOST_GRADIENT_TILE", tile)
    objective(layer(inputs(5))).backward()
    assert layer.lift_weight.principal_values.grad is not None
    # Float64: the same sums, in an order that may depend on the shape of the product.
    expected = principal_entries(plain.weight.grad, layer)
    torch.testing.assert_close(layer.lift_weight.principal_values.grad, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shape", [(1, 5), (7, 1), (10, 10), (11, 3), (4096, 11008)])
@pytest.mark.parametrize("entries", [1, 10, 33, 2**22])
def test_tiles_cover_the_rows_and_are_about_equal(shape: tuple[int, int], entries: int) -> None:
    tiles = layers._row_tiles(*shape, entries)
    assert [row for tile in tiles for row in range(tile.start, tile.stop)] == list(range(shape[0]))
    sizes = [tile.stop - tile.start for tile in tiles]
    assert max(sizes) == sizes[0] <= -(-max(entries, shape[1]) // shape[1])


def test_gradient_of_blocks_is_that_of_their_entries() -> None:
    plain = plain_layer("linear")
    layer = managed_twin(plain)
    entries = torch.zeros(OUT, IN, dtype=torch.bool)
    entries[:, 2:4] = entries[:, 8:] = True  # blocks of (7, 2)
    index = entries.flatten().nonzero().flatten()
    layout = IndexLayout(OUT, IN, index.numel(), (OUT, 2))
    words = encode(index, OUT, IN, (OUT, 2))
    layer.principal = PrincipalSet(layer.weight.detach().reshape(-1)[index], words, layout)
    for model in (plain, layer):
        objective(model(inputs(5))).backward()
    assert layer.lift_weight.principal_index.tolist() == index.tolist()
    assert layer.principal.index.words.numel() == 2  # one row of blocks, two columns
    assert layer.lift_weight.principal_values.grad is not None
    # Float64: as above.
    expected = principal_entries(plain.weight.grad, layer)
    torch.testing.assert_close(layer.lift_weight.principal_values.grad, expected, rtol=1e-12, atol=1e-13)


def peak_bytes_of_a_backward() -> int:
    """Of four layers of 64 x 64 in float32, what is allocated at once in a forward and backward."""
    torch.manual_seed(14)
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4)))
    lift_ds.LiftAdamW(lift_ds.attach(model, lift_ds.LiftConfig(density=0.05, lra_rank=4)))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        objective(model(torch.randn(2, 64))).backward()
    live = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def test_no_dense_gradient_outlives_the_backward_of_its_layer() -> None:
    """Of several large layers, at no time is there more than one gradient of the size of a weight."""
    dense = 64 * 64 * 4
    assert dense <= peak_bytes_of_a_backward() < 2 * dense


def test_of_a_large_layer_no_dense_gradient_exists_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """By tiles of an eighth of a weight, less is alive at once than without them by most of a weight."""
    dense = 64 * 64 * 4
    whole = peak_bytes_of_a_backward()
    monkeypatch.setattr(layers, "HOST_GRADIENT_TILE", 64 * 8)
    assert peak_bytes_of_a_backward() <= whole - 0.75 * dense
