"""Pins down that stacks of experts are trained as Algorithm 1 says, each matrix of a stack by itself: on every ZeRO
stage, on 1 and 2 ranks, in three models whose stacks lie and are read in different ways.

Tolerances are those of test_parity.py, for the same reasons. Tokens go to the same experts in all runs: where they did
not, the losses would differ by far more.
"""

from __future__ import annotations

import functools
from typing import Any

import cases
import pytest
import torch
from harness import run_ranks

from lift_ds.reference import ReferenceLift

TOLERANCE = 1e-6


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((ranks, every), marks=[pytest.mark.slow] * every, id=f"{ranks}ranks" + "-every" * every)
        for every in (False, True)
        for ranks in (1, 2)
    ],
)
def launch(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    """What was run, and what rank 0 saved of it."""
    ranks, every = request.param
    found = run_ranks("parity_experts", ranks, tmp_path_factory.mktemp("experts"), *["every"] * every)
    return cases.experts_runs(ranks, every), found[0]


@functools.cache
def train_reference(kind: str) -> dict[str, Any]:
    model = cases.build(kind).requires_grad_(False)
    whole = {name: weight.requires_grad_() for name, weight in cases.managed_stacks(model).items()}
    reference = ReferenceLift(
        {f"{name} {number}": each for name, weight in whole.items() for number, each in enumerate(matrices(weight))},
        cases.PARITY,
    )
    losses, indices = [], []
    for step in range(cases.PARITY_STEPS):
        loss = cases.loss_of(model, kind, step)
        loss.backward()
        for name, weight in whole.items():
            assert weight.grad is not None
            for number, each in enumerate(matrices(weight.grad)):
                reference.weights[f"{name} {number}"].grad = each.clone()
            weight.grad = None
        reference.step()
        losses.append(loss.item())
        if (step + 1) % cases.PARITY.refresh_interval == 0:
            indices.append({name: whole_index(reference, name, weight) for name, weight in whole.items()})
    return {"losses": losses, "indices": indices, "weights": {name: w.detach() for name, w in whole.items()}}


def matrices(weight: torch.Tensor) -> list[torch.Tensor]:
    """The matrices of a weight, in its memory, as leaves."""
    stack = weight.detach() if weight.dim() == 3 else weight.detach()[None]
    return [each.requires_grad_() for each in stack]


def whole_index(reference: ReferenceLift, name: str, weight: torch.Tensor) -> torch.Tensor:
    """Flat positions in the whole weight."""
    found, stack = reference.indices(), matrices(weight)
    parts = [found[f"{name} {number}"] + number * each.numel() for number, each in enumerate(stack)]
    return torch.cat(parts)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", cases.EXPERTS)
def test_every_stage_follows_the_reference(launch: tuple[Any, dict[str, Any]], kind: str, stage: int) -> None:
    runs, saved = launch
    if (kind, stage) not in runs:
        pytest.skip("run with the slow tests")
    run, expected = saved[f"{kind} stage {stage}"], train_reference(kind)
    assert run["losses"] == pytest.approx(expected["losses"], rel=TOLERANCE)
    assert len(run["indices"]) == 3
    for ours, theirs in zip(run["indices"], expected["indices"], strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), name
    for name, weight in expected["weights"].items():
        found = run["weights"][name if name in run["weights"] else f"{name}.weight"]
        assert ((found - weight).norm() / weight.norm()).item() < TOLERANCE, name
    # 8 matrices of attention and 16 of experts, each selected in by itself.
    assert run["refreshes"] == [(step, 24, 0) for step in (20, 40, 60)]


@pytest.mark.parametrize("kind", cases.EXPERTS)
def test_selections_of_experts_move(kind: str) -> None:
    """Otherwise "identical indices" would say nothing about refreshes."""
    first, *_, last = train_reference(kind)["indices"]
    assert all(not torch.equal(first[name], last[name]) for name in first if ".experts." in name)
