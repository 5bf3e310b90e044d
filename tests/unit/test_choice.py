"""What `auto` means: the exact solver for small matrices, the iterative one for large ones, by the measured sizes."""

from __future__ import annotations

import pytest
import torch

import lift_ds
from lift_ds.refresh.schedule import plan_refresh
from lift_ds.selection import MatrixSize, SelectionSettings, choose_solver, select_principal


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_the_shorter_side_and_the_rank_decide(device_type: str) -> None:
    def choice(rows: int, columns: int, rank: int) -> str:
        assert choose_solver(rows, columns, rank, device_type) == choose_solver(columns, rows, rank, device_type)
        return choose_solver(rows, columns, rank, device_type)

    assert choice(4096, 11008, 128) == choice(2048, 5504, 128) == choice(512, 4096, 16) == "chebyshev"
    assert choice(511, 100_000, 4) == choice(1024, 4096, 256) == "gram"


def test_auto_runs_what_the_plan_says() -> None:
    config = lift_ds.LiftConfig(density=0.05, lra_rank=8)
    shapes = {"small": (64, 900), "large": (512, 520)}
    sizes = {name: MatrixSize.of(shape, 4) for name, shape in shapes.items()}
    plan = plan_refresh(sizes, config, ranks=1, collected=False, device_type="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, solver in (("small", "gram"), ("large", "chebyshev")):
        found = select_principal(torch.randn(shapes[name], generator=generator), SelectionSettings(2000, lra_rank=8))
        assert plan.settings[name].solver == found.solver == solver
