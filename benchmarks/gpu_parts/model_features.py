"""Checks of what a program around LIFT may do on a device: torch.compile, FlashAttention, TF32; and that a step does
not wait for the device.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import lift_ds
from benchmarks.gpu_parts import small_llama as llama
from benchmarks.gpu_parts.cells import Batch, Cell, SkippedError
from benchmarks.measure.records import Record
from benchmarks.measure.spectra import matrix

_SETTINGS = lift_ds.LiftConfig(density=0.1, lra_rank=4, refresh_interval=2, lr=1e-3)
_STEPS = 4

#: Losses of a model in bf16 whose attention is computed in another order: its numbers have 8 bits.
_BF16_TOLERANCE = 2e-2
#: Losses in float32 with fused sums: 6e-8 each, over some hundred terms and a few steps.
_FUSED_TOLERANCE = 1e-5
#: Share of the entries that another order of sums may select otherwise, where two are nearly equal.
_TIES = 0.002


def cells() -> list[Cell]:
    """Return the checks that may share a process with others."""
    return [
        Cell("waiting: a step does not wait for the device", check_waiting),
        Cell("FlashAttention of torch", check_flash_of_torch),
        Cell("FlashAttention, package flash_attn", check_flash_attn),
        Cell("torch.compile", check_compile, expected=90.0, limit=240.0),
    ]


def precision_batch(small: bool) -> Batch:
    """Return the check of what is set for a whole process."""
    return Batch([Cell("precision: a selection is the same with TF32 and autocast", check_precision, (small,))])


def check_precision(device: str, small: bool) -> Record:
    """Selections do not change with what the program allows for its own products, and leave that as it is."""
    rows, columns, rank = (96, 160, 16) if small else (1024, 2816, 128)
    weight = matrix("trained-like", rows, columns, rank, device=device)
    solvers = ("svd", "gram", "chebyshev")

    def select(solver: str) -> Tensor:
        k = round(0.05 * weight.numel())
        return lift_ds.principal_indices(weight, k=k, lra_rank=rank, solver=solver)

    torch.set_float32_matmul_precision("highest")
    expected = {solver: select(solver) for solver in solvers}
    tried = []
    for name, allowed in _precisions(device).items():
        with allowed():
            before = torch.get_float32_matmul_precision()
            for solver in solvers:
                differing = expected[solver].numel() - int(torch.isin(select(solver), expected[solver]).sum())
                assert not differing, f"{name}, {solver}: {differing} of {expected[solver].numel()} entries differ"
            assert torch.get_float32_matmul_precision() == before, f"{name} was changed"
        tried.append(name)
    return {"tried": tried}


def _precisions(device: str) -> dict[str, Callable[[], contextlib.AbstractContextManager[Any]]]:
    @contextlib.contextmanager
    def matmul_precision(level: str) -> Iterator[None]:
        torch.set_float32_matmul_precision(level)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision("highest")

    return {
        "set_float32_matmul_precision: high": lambda: matmul_precision("high"),
        "set_float32_matmul_precision: medium": lambda: matmul_precision("medium"),
        "autocast": lambda: torch.autocast(device, torch.bfloat16),
    }


def check_waiting(device: str) -> Record:
    """Forward, backward and step between two refreshes give the device work without ever waiting for it."""
    if device != "cuda":
        raise SkippedError("there is no device to wait for")
    model: Any = nn.Sequential(nn.Linear(256, 512, bias=False), nn.SiLU(), nn.Linear(512, 256, bias=False)).to(device)
    settings = lift_ds.LiftConfig(density=0.1, lra_rank=8, refresh_interval=4)
    model = lift_ds.attach(model, settings)
    optimizer = lift_ds.LiftAdamW(model, lr=1e-3)
    x = torch.randn(64, 256, device=device)

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(5):  # with a refresh, and what is looked at once in the beginning
        step()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(2):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"steps": 2}


def check_compile(device: str) -> Record:
    """A compiled model trains as the model itself, its layers in one graph; by Triton's kernels on a device."""
    import torch._dynamo

    # On the host inductor would need a C++ compiler, and a second layer adds time alone.
    backend, layers = ("inductor", 2) if device == "cuda" else ("aot_eager", 1)

    def compiled(model: Any) -> Any:
        return torch.compile(model, backend=backend, fullgraph=True)

    torch.set_float32_matmul_precision("highest")
    expected, indices = _train(llama.build(device, layers=layers), device)
    found, compiled_indices = _train(llama.build(device, layers=layers), device, compiled)
    _require_near(found, expected, _FUSED_TOLERANCE)
    entries = sum(index.numel() for index in indices.values())
    wrong = entries - sum(int(torch.isin(compiled_indices[name], index).sum()) for name, index in indices.items())
    assert wrong <= _TIES * entries, f"{wrong} of {entries} entries of the indices differ"
    return {"backend": backend, "losses": found}


def check_flash_of_torch(device: str) -> Record:
    """The attention kernel that comes with torch, by torch.nn.functional.scaled_dot_product_attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    expected, _ = _train(llama.build(device, torch.bfloat16), device)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        found, _ = _train(llama.build(device, torch.bfloat16, attention="sdpa"), device)
    _require_near(found, expected, _BF16_TOLERANCE)
    return {"losses": found}


def check_flash_attn(device: str) -> Record:
    """The package flash_attn, by transformers."""
    if importlib.util.find_spec("flash_attn") is None:
        raise SkippedError("flash_attn is not installed")
    if device != "cuda":
        raise SkippedError("flash_attn runs on GPUs alone")
    expected, _ = _train(llama.build(device, torch.bfloat16), device)
    found, _ = _train(llama.build(device, torch.bfloat16, attention="flash_attention_2"), device)
    _require_near(found, expected, _BF16_TOLERANCE)
    return {"losses": found}


def _train(
    model: Any, device: str, wrap: Callable[[Any], Any] = lambda model: model
) -> tuple[list[float], dict[str, Tensor]]:
    """Train by plain PyTorch, with a refresh; return losses and indices.

    Args:
        model: without LIFT.
        device: where it is.
        wrap: makes of the attached model what is called.
    """
    model = lift_ds.attach(model, _SETTINGS)
    optimizer = lift_ds.LiftAdamW(model, lr=_SETTINGS.lr)
    run, losses = wrap(model), []
    for step in range(_STEPS):
        loss = llama.loss_of(run, step, device)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, llama.indices_of(model)


def _require_near(found: list[float], expected: list[float], tolerance: float) -> None:
    off = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
    assert off <= tolerance, f"losses {found} are off {expected} by {off:.1e} relative, more than {tolerance:.0e}"
