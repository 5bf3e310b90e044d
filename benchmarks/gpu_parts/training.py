"""Checks of training on one rank: it follows Algorithm 1, skips what overflows, and resumes to the bit.

The reference (lift_ds/reference.py) selects and steps on the host, in float32; forward and backward of its dense model
run on the device as those of the model that is checked. Indices are compared exactly, which says something because no
selection of the reference is near a tie (`nearest_tie`). Losses and weights (by norm) are compared to 1e-5: the same
sums in float32, each exact to 6e-8, are made in other orders over the steps, and Adam divides by square roots of small
numbers; a step that was left out, or trained one entry more, shows from 1e-4 on. TF32 is off.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import tempfile
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import lift_ds
from benchmarks.gpu_parts import small_llama as llama
from benchmarks.gpu_parts.cells import Batch, Cell, SkippedError
from benchmarks.measure.records import Record
from lift_ds.reference import ReferenceLift

TOLERANCE = 1e-5
#: Selections whose last entry and the next one are nearer than this, relative, could come out either way.
_TIE = 1e-4

_SETTINGS = lift_ds.LiftConfig(
    density=0.1, lra_rank=4, refresh_interval=4, solver="svd", lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1
)
#: Steps with two refreshes, and some after each.
_STEPS = 10

#: With so large a tolerance the solver stops early, and what it selects depends on where it started: a resume that lost
#: the subspaces would show.
_RESUMED = dataclasses.replace(_SETTINGS, solver="chebyshev", selection_tolerance=0.3)

_BF16: Record = {"bf16": {"enabled": True, "check_grad_overflow": True}}
#: Begins with a loss scale at which fp16 overflows for sure, and halves it with each step that does.
_FP16: Record = {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 24, "hysteresis": 1}}


@dataclass
class Trajectory:
    """What a training did.

    Attributes:
        losses: of each step.
        indices: after each refresh.
        weights: at the end.
    """

    losses: list[float] = field(default_factory=list)
    indices: list[dict[str, Tensor]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


def plain_cells() -> list[Cell]:
    """Return the checks without DeepSpeed."""
    return [Cell("parity: plain PyTorch", check_plain), Cell("overflow: plain, torch's GradScaler", check_scaler)]


def batch() -> Batch:
    """Return the checks with DeepSpeed; last those that need its Adam for the host, which has to be compiled."""
    stages = [Cell(f"parity: ZeRO-{stage}", check_parity, (stage,)) for stage in range(4)]
    overflows = [
        *(Cell(f"overflow: bf16, ZeRO-{stage}", check_overflow, (stage, "bf16")) for stage in (2, 3)),
        *(Cell(f"overflow: fp16, ZeRO-{stage}", check_overflow, (stage, "fp16")) for stage in (2, 3)),
    ]
    resumes = [Cell(f"resume: ZeRO-{stage}", check_resume, (stage,)) for stage in (2, 3)]
    offloads = [
        Cell("offload: the Adam for the host is there", check_host_adam, expected=120.0, limit=300.0),
        Cell("offload: ZeRO-2, optimizer", check_parity, (2, ("optimizer",)), limit=240.0),
        Cell("offload: ZeRO-3, optimizer", check_parity, (3, ("optimizer",)), limit=240.0),
        Cell("offload: ZeRO-3, optimizer and parameters", check_parity, (3, ("optimizer", "param")), limit=240.0),
    ]
    return Batch([*stages, *overflows, *resumes, *offloads], group=True)


@functools.cache
def reference(device: str) -> tuple[Trajectory, float, dict[str, Tensor]]:
    """Train by Algorithm 1.

    Returns:
        What it did; how near its selections came to a tie; which entries were ever selected.
    """
    _prepare_numerics()
    model = llama.build(device).requires_grad_(False)
    weights = llama.managed_weights(model)
    for weight in weights.values():
        weight.requires_grad_(True)
    copies = {name: weight.detach().cpu().clone().requires_grad_() for name, weight in weights.items()}
    algorithm = ReferenceLift(copies, _SETTINGS)
    done, tie = Trajectory(), nearest_tie(copies, _SETTINGS)
    ever = {name: mask.clone() for name, mask in algorithm.masks.items()}
    for step in range(_STEPS):
        loss = llama.loss_of(model, step, device)
        loss.backward()
        for name, weight in weights.items():
            assert weight.grad is not None
            copies[name].grad, weight.grad = weight.grad.cpu(), None
        algorithm.step()
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(copies[name])
        done.losses.append(loss.item())
        if (step + 1) % _SETTINGS.refresh_interval == 0:
            done.indices.append(algorithm.indices())
            tie = min(tie, nearest_tie(copies, _SETTINGS))
            ever = {name: ever[name] | mask for name, mask in algorithm.masks.items()}
    done.weights = {name: weight.detach().clone() for name, weight in copies.items()}
    return done, tie, ever


def nearest_tie(weights: dict[str, Tensor], settings: lift_ds.LiftConfig) -> float:
    """Return how far, relative, the last entry of a selection is from the first that is not selected; the least."""
    nearest = float("inf")
    for weight in weights.values():
        u, s, vh = torch.linalg.svd(weight.detach().double(), full_matrices=False)
        scores = ((u * s)[:, : settings.lra_rank] @ vh[: settings.lra_rank]).abs().flatten()
        k = settings.entries(*weight.shape)
        last, following = scores.topk(k + 1).values[-2:].tolist()
        nearest = min(nearest, (last - following) / last)
    return nearest


def check_plain(device: str) -> Record:
    """Plain PyTorch: `attach` and LiftAdamW, without DeepSpeed."""
    _prepare_numerics()
    model = lift_ds.attach(llama.build(device), _SETTINGS)
    optimizer = lift_ds.LiftAdamW(model, lr=_SETTINGS.lr, weight_decay=_SETTINGS.weight_decay)
    done = Trajectory()
    for step in range(_STEPS):
        loss = llama.loss_of(model, step, device)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        _note(done, step, loss.item(), model)
    return compare(done, device, TOLERANCE)


def check_parity(device: str, stage: int, offload: tuple[str, ...] = ()) -> Record:
    """DeepSpeed on one rank.

    Args:
        device: "cuda" or "cpu".
        stage: of ZeRO.
        offload: "optimizer" and "param".
    """
    _prepare_numerics()
    model = llama.build(device)
    engine = llama.engine_over(model, llama.ds_config(stage, offload=offload), _SETTINGS)
    done = Trajectory()
    for step, loss in enumerate(llama.train_engine(engine, device, range(_STEPS))):
        _note(done, step, loss, model)
    engine.destroy()
    # Offloaded, another Adam kernel makes the steps, with rounding of its own.
    return compare(done, device, 5 * TOLERANCE if offload else TOLERANCE)


def _note(done: Trajectory, step: int, loss: float, model: Any) -> None:
    done.losses.append(loss)
    if (step + 1) % _SETTINGS.refresh_interval == 0:
        done.indices.append(llama.indices_of(model))
    if step + 1 == _STEPS:
        done.weights = llama.weights_of(model)


def compare(done: Trajectory, device: str, tolerance: float) -> Record:
    """Compare a training with the reference.

    Raises:
        AssertionError: says what differs, and by how much.
    """
    expected, tie, ever = reference(device)
    if tie < _TIE:
        raise AssertionError(f"a selection of the reference is {tie:.1e} from a tie: choose another seed")
    for number, (ours, theirs) in enumerate(zip(done.indices, expected.indices, strict=True), 1):
        for name, index in theirs.items():
            wrong = index.numel() - int(torch.isin(ours[name], index).sum())
            assert torch.equal(ours[name], index), (
                f"refresh {number}, {name}: {wrong} of {index.numel()} entries differ"
            )
    losses = max(abs(a - b) / abs(b) for a, b in zip(done.losses, expected.losses, strict=True))
    weights = max(
        float((done.weights[name] - weight).norm() / weight.norm()) for name, weight in expected.weights.items()
    )
    assert losses <= tolerance, f"losses differ by {losses:.2e} relative, more than {tolerance:.0e}"
    assert weights <= tolerance, f"weights differ by {weights:.2e} relative, more than {tolerance:.0e}"
    before = llama.weights_of(llama.build("cpu"))
    for name, weight in done.weights.items():
        outside = ~ever[name]
        assert torch.equal(weight[outside], before[name][outside]), f"{name} changed outside its principal weights"
    churned = any(not torch.equal(expected.indices[0][name], expected.indices[-1][name]) for name in expected.weights)
    assert churned, "the selection never moved, so that equal indices say nothing"
    return {"losses_off": losses, "weights_off": weights, "nearest_tie": tie}


def check_host_adam(device: str) -> Record:
    """DeepSpeed's Adam for offloaded states, which it compiles at first use where it was not compiled before."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    DeepSpeedCPUAdam([torch.nn.Parameter(torch.zeros(8))])
    return {}


def check_overflow(device: str, stage: int, kind: str) -> Record:
    """A step whose gradients overflow moves nothing and is not counted; refreshes follow the steps that were applied.

    Args:
        device: "cuda" or "cpu".
        stage: of ZeRO.
        kind: "bf16", where two losses are made infinite, or "fp16", where a too large loss scale does it as well.
    """
    _require_dtype(kind)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    model = llama.build(device, dtype)
    engine = llama.engine_over(model, llama.ds_config(stage, **(_BF16 if kind == "bf16" else _FP16)), _SETTINGS)
    driver = engine.optimizer.driver
    applied, skipped, forced = 0, 0, 0
    while applied < _SETTINGS.refresh_interval + 1:
        assert skipped < 30, f"{skipped} steps were skipped and {applied} applied"
        before = llama.weights_of(model), llama.indices_of(model)
        loss = llama.loss_of(engine, applied + skipped, device)
        if applied in (1, 3) and forced < applied:
            loss, forced = loss * float("inf"), applied
        engine.backward(loss)
        engine.step()
        after = llama.weights_of(model), llama.indices_of(model)
        moved = not all(_equal(one, other) for one, other in zip(before, after, strict=True))
        counted = driver.applied_steps - applied
        assert counted == moved, f"step {applied + skipped + 1}: {counted} was counted, while weights moved: {moved}"
        applied, skipped = applied + counted, skipped + (not counted)
    refreshed = [report.step for report in driver.reports]
    engine.destroy()
    assert skipped >= 2, f"{skipped} steps overflowed, where two losses were made infinite"
    assert refreshed == [_SETTINGS.refresh_interval], f"refreshes at the applied steps {refreshed}"
    return {"applied": applied, "skipped": skipped}


def check_scaler(device: str) -> Record:
    """torch's own loss scale: its fused kernel skips a step by itself, and LIFT neither counts it nor writes back."""
    model = lift_ds.attach(llama.build(device), _SETTINGS)
    optimizer = lift_ds.LiftAdamW(model, lr=_SETTINGS.lr)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**24)
    assert optimizer.driver is not None
    skipped = 0
    while optimizer.driver.applied_steps < 3:
        assert skipped < 30, f"{skipped} steps were skipped"
        before, count = llama.weights_of(model), optimizer.driver.applied_steps
        with torch.autocast(device, torch.float16):
            loss = llama.loss_of(model, count + skipped, device)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved = not _equal(before, llama.weights_of(model))
        counted = optimizer.driver.applied_steps - count
        assert counted == moved, f"{counted} step was counted, while weights moved: {moved}"
        skipped += not counted
    assert skipped, "no step overflowed"
    return {"applied": optimizer.driver.applied_steps, "skipped": skipped}


def check_resume(device: str, stage: int) -> Record:
    """A run that is saved, and goes on in a new engine over a new model, ends as one that never stopped, to the bit."""
    _prepare_numerics()
    whole, weights, indices = _train_bf16(device, stage, range(_STEPS))
    stop = _SETTINGS.refresh_interval + 1
    with tempfile.TemporaryDirectory() as folder:
        first, *_ = _train_bf16(device, stage, range(stop), save=folder)
        rest, resumed_weights, resumed_indices = _train_bf16(device, stage, range(stop, _STEPS), load=folder)
    assert first + rest == whole, f"losses {first + rest} instead of {whole}"
    assert _equal(indices, resumed_indices), "the indices differ"
    assert _equal(weights, resumed_weights), "the weights differ"
    return {"stopped_after": stop, "steps": _STEPS}


def _train_bf16(
    device: str, stage: int, steps: range, *, save: str = "", load: str = ""
) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Train by a new engine; return losses, weights and indices."""
    model = llama.build(device, torch.bfloat16)
    engine = llama.engine_over(model, llama.ds_config(stage, bf16={"enabled": True}), _RESUMED)
    if load:
        engine.load_checkpoint(load)
    losses = list(llama.train_engine(engine, device, steps))
    if save:
        engine.save_checkpoint(save)
    found = losses, llama.weights_of(model), llama.indices_of(model)
    engine.destroy()
    return found


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def _require_dtype(kind: str) -> None:
    from deepspeed.accelerator import get_accelerator

    if kind == "fp16" and not get_accelerator().is_fp16_supported():
        raise SkippedError("DeepSpeed does not train in fp16 on this device")


def _prepare_numerics() -> None:
    """Let products of float32 keep all digits, and sums of cuBLAS come in one order; before the first of them."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_float32_matmul_precision("highest")
