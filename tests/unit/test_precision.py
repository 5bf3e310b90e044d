"""Pins that a selection does not depend on the precision that the training around it has chosen: by torch's old
switches, by its new ones, by both in contradiction, under autocast, with another default dtype or device; and that it
leaves every switch as it was.

The matrix is one in which any other rounding selects other entries: all magnitudes of W' are equal but for that. What
the switches for CUDA say is read while each product runs, since nothing here would be rounded by them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.backends import _FP32Precision
from torch.utils._python_dispatch import TorchDispatchMode

from lift_ds import principal_indices
from lift_ds.selection import select

#: The tree of the new switches: (backend, operations), each after the one it follows.
SWITCHES = [("generic", "all"), ("cuda", "all"), ("mkldnn", "all"), ("cuda", "matmul"), ("mkldnn", "matmul")]


Setting = Callable[[], None]


def old(precision: str) -> Setting:
    return lambda: torch.set_float32_matmul_precision(precision)


def new(backend: str, operations: str, precision: str) -> Setting:
    return assign(_FP32Precision(backend, operations), "fp32_precision", precision)


def assign(holder: Any, name: str, value: Any) -> Setting:
    return lambda: setattr(holder, name, value)


#: What a user may have set, by the names that torch has for users, in this order.
SETTINGS: dict[str, list[Setting]] = {
    "nothing": [],
    "old high": [old("high")],
    "old medium": [old("medium")],
    "old allow_tf32": [assign(torch.backends.cuda.matmul, "allow_tf32", True)],
    "old allow_tf32 of cudnn": [assign(torch.backends.cudnn, "allow_tf32", False)],
    "new tf32": [assign(torch.backends, "fp32_precision", "tf32")],
    "new bf16": [assign(torch.backends, "fp32_precision", "bf16")],
    "new ieee": [assign(torch.backends, "fp32_precision", "ieee")],
    "new cuda tf32": [assign(torch.backends.cudnn, "fp32_precision", "tf32")],
    "new cuda matmul tf32": [assign(torch.backends.cuda.matmul, "fp32_precision", "tf32")],
    "new mkldnn bf16": [assign(torch.backends.mkldnn, "fp32_precision", "bf16")],  # torch 2.13 sets all backends by it
    "new mkldnn bf16, itself": [new("mkldnn", "all", "bf16")],
    "new mkldnn matmul bf16": [assign(torch.backends.mkldnn.matmul, "fp32_precision", "bf16")],
    "old high, new ieee": [old("high"), new("cuda", "matmul", "ieee")],
    "old medium, new ieee": [old("medium"), new("mkldnn", "matmul", "ieee")],
    "new tf32, old highest": [new("generic", "all", "tf32"), old("highest")],
    "old high, new tf32 above": [old("high"), new("generic", "all", "tf32"), new("cuda", "matmul", "none")],
}
SOLVERS = ["svd", "gram", "chebyshev"]


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS)
def setting(request: pytest.FixtureRequest) -> Iterator[Setting]:
    """Sets what a user has set; all is as before after the test."""

    def set_all() -> None:
        for one in request.param:
            one()

    with switches_kept():
        yield set_all


@contextmanager
def switches_kept() -> Iterator[None]:
    own, cudnn = own_settings(), torch.backends.cudnn.allow_tf32
    legacy = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = cudnn
        torch.set_float32_matmul_precision(legacy)
        for (backend, operations), precision in own.items():
            new(backend, operations, precision)()


def own_settings() -> dict[tuple[str, str], str]:
    """What each switch itself says, "none" where it follows another one."""
    own = {}
    for switch in SWITCHES:
        own[switch] = _FP32Precision(*switch).fp32_precision
        new(*switch, "none")()
    for switch, precision in own.items():
        new(*switch, precision)()
    return own


def readings() -> dict[str, Any]:
    """What torch says of all switches, the message where it refuses to."""
    asked: dict[str, Callable[[], Any]] = {
        "get_float32_matmul_precision": torch.get_float32_matmul_precision,
        "cuda.matmul.allow_tf32": lambda: torch.backends.cuda.matmul.allow_tf32,
        "cudnn.allow_tf32": lambda: torch.backends.cudnn.allow_tf32,
        "cudnn.conv": lambda: torch.backends.cudnn.conv.fp32_precision,
        "fp32_precision": lambda: torch.backends.fp32_precision,
        "autocast": lambda: (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        **{f"{backend} {operations}": lambda b=backend, o=operations: _FP32Precision(b, o).fp32_precision
           for backend, operations in SWITCHES},
    }  # fmt: skip
    said = {}
    for name, ask in asked.items():
        try:
            said[name] = ask()
        except RuntimeError as error:
            said[name] = str(error)
    return said


def fragile() -> Tensor:
    """[160, 192] of next to equal magnitudes."""
    generator = torch.Generator().manual_seed(3)
    signs = [torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1 for size in (160, 192)]
    weight = torch.outer(*signs)
    return weight + 1e-7 * torch.randn(160, 192, generator=generator)


def selection(solver: str) -> Tensor:
    return principal_indices(fragile(), k=9_000, lra_rank=3, solver=solver, seed=5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_selection_is_the_same_with_every_setting(setting: Setting, solver: str) -> None:
    expected = selection(solver)
    setting()
    assert torch.equal(selection(solver), expected)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_selection_is_the_same_under_autocast(solver: str) -> None:
    expected = selection(solver)
    with torch.autocast("cpu", torch.bfloat16):
        found = selection(solver)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(found, expected)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_selection_is_the_same_with_another_default_dtype_or_device(dtype: torch.dtype, solver: str) -> None:
    """As code that loads a model sets them."""
    weight, expected = fragile(), selection(solver)
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            found = principal_indices(weight, k=9_000, lra_rank=3, solver=solver, seed=5)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_a_selection_leaves_every_switch_as_it_was(setting: Setting) -> None:
    setting()
    said, own = readings(), own_settings()
    selection("gram")
    assert readings() == said
    assert own_settings() == own


def test_switches_are_as_they_were_after_an_error(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("the factorisation failed")

    setting()
    said, own = readings(), own_settings()
    monkeypatch.setattr(select, "low_rank_factors", fail)
    with pytest.raises(RuntimeError, match="factorisation"):
        selection("gram")
    assert readings() == said
    assert own_settings() == own


@pytest.mark.parametrize("backend", ["cuda", "mkldnn"])
def test_a_switch_that_followed_another_one_follows_it_still(backend: str) -> None:
    with switches_kept():
        for above in ("generic", backend):
            new(backend, "matmul", "none")()
            new(above, "all", "tf32")()
            selection("gram")
            for later in ("ieee", "tf32"):
                new(above, "all", later)()
                assert _FP32Precision(backend, "matmul").fp32_precision == later


class Products(TorchDispatchMode):
    """Notes what a product on CUDA, and one on the CPU, would ask the switches at its moment."""

    NAMES = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "matmul")

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[dict[str, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket.__name__ in self.NAMES:
            self.asked.append(readings())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_product_finds_full_precision_in_old_and_new_switches(setting: Setting, solver: str) -> None:
    """Where they contradict each other, a product on CUDA ends in an error."""
    setting()
    with Products() as products:
        selection(solver)
    assert len(products.asked) > 1
    for asked in products.asked:
        assert asked["cuda.matmul.allow_tf32"] is False
        assert asked["get_float32_matmul_precision"] == "highest"
        assert asked["cuda matmul"] == asked["mkldnn matmul"] == "ieee"


def _without_care(device: torch.device) -> AbstractContextManager[None]:
    return nullcontext()


@pytest.mark.parametrize("solver", SOLVERS)
def test_without_care_other_precision_selects_other_entries(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the tests above: were W' to survive any rounding, they could not fail."""
    expected = selection(solver)
    monkeypatch.setattr(select, "full_precision", _without_care)
    assert torch.equal(selection(solver), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(selection(solver), expected)
    with switches_kept():
        x = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
        plain = x @ x
        old("medium")()
        # Where the processor has products in bf16. Those after an SVD have three terms, which add up alike.
        if solver != "svd" and not torch.equal(x @ x, plain):
            assert not torch.equal(selection(solver), expected)
