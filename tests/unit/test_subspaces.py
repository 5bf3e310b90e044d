"""The subspaces that "chebyshev" starts from: each rank keeps those of the matrices it selects in, a checkpoint has
them, and the next selection really starts there.

That a resumed run selects the same entries, to the bit, is pinned down by tests/distributed/test_behaviour.py.
"""

from __future__ import annotations

from pathlib import Path

import torch
from cases import Matrices, build
from safetensors.torch import load_file
from torch import nn

import lift_ds
from lift_ds.checkpoint import commit, rank_files, subspaces
from lift_ds.model.attachment import require_attachment
from lift_ds.refresh.schedule import plan_refresh
from lift_ds.selection import MatrixSize, SelectionSettings, select_principal

CONFIG = lift_ds.LiftConfig(budget_rank=3, lra_rank=4, refresh_interval=2, solver="chebyshev")
#: "whole" has a side of 8, where W' of rank 4 is factored too.
SIDES = {"tall": 12, "wide": 10, "square": 32, "whole": 8}


def attached(config: lift_ds.LiftConfig = CONFIG) -> nn.Module:
    return lift_ds.attach(build("matrices"), config)


def test_attach_keeps_a_subspace_of_the_smaller_side_of_each_matrix() -> None:
    kept = require_attachment(attached()).subspaces
    assert {name: subspace.shape[0] for name, subspace in kept.items()} == SIDES
    assert {subspace.dtype for subspace in kept.values()} == {torch.float16}
    assert require_attachment(attached(lift_ds.LiftConfig(budget_rank=3, lra_rank=4, solver="gram"))).subspaces == {}


def test_a_refresh_starts_from_them_and_replaces_them(lift_log: list[str]) -> None:
    model = attached()
    attachment = require_attachment(model)
    before = {name: subspace.clone() for name, subspace in attachment.subspaces.items()}
    optimizer = lift_ds.LiftAdamW(model, lr=0.05)
    for step in range(2):
        model(torch.randn(4, 60, generator=torch.Generator().manual_seed(step))).backward()
        optimizer.step()
    assert attachment.subspaces.keys() == before.keys()
    assert not torch.equal(attachment.subspaces["square"], before["square"])
    assert optimizer.driver is not None
    (report,) = optimizer.driver.reports
    assert 0 < report.estimate <= CONFIG.selection_tolerance
    assert f"selections exact up to an estimated {report.estimate:.2%}" in lift_log[-1]


def test_the_log_says_where_the_solver_fell_back(lift_log: list[str]) -> None:
    """Two equal singular values at the cut: the iteration cannot tell them apart."""
    model = nn.Sequential(nn.Linear(24, 24, bias=False))
    model[0].weight.data = torch.eye(24)
    lift_ds.attach(model, lift_ds.LiftConfig(density=0.1, lra_rank=4, refresh_interval=1, solver="chebyshev"))
    note = 'in 1 of them chebyshev did not reach "selection_tolerance" and gram was used'
    assert lift_log[-1].endswith(note)
    optimizer = lift_ds.LiftAdamW(model, lr=0.0)
    model(torch.ones(1, 24)).sum().backward()
    optimizer.step()
    assert lift_log[-1].endswith(note)
    assert optimizer.driver is not None
    assert [report.fell_back for report in optimizer.driver.reports] == [1]


def test_parts_are_reported_together_in_one_line(lift_log: list[str]) -> None:
    config = lift_ds.LiftConfig(budget_rank=3, lra_rank=4, refresh_interval=4, refresh_parts=3)
    model = attached(config)
    optimizer = lift_ds.LiftAdamW(model, lr=0.05)
    lines = len(lift_log)
    for step in range(7):
        model(torch.randn(4, 60, generator=torch.Generator().manual_seed(step))).backward()
        optimizer.step()
    assert optimizer.driver is not None
    reports = optimizer.driver.reports
    assert [report.step for report in reports] == [4, 5, 6]
    (line,) = lift_log[lines:]
    entries, replaced = (sum(getattr(report, key) for report in reports) for key in ("entries", "replaced"))
    assert line.startswith(
        f"INFO LIFT refresh at step 6: 4 matrices, {entries:,} entries, churn {replaced / entries:.1%}, "
    )
    assert line.endswith(" s in 3 parts")


def test_a_selection_from_an_earlier_subspace_takes_fewer_products() -> None:
    weight = torch.randn(192, 320, generator=torch.Generator().manual_seed(1))
    settings = SelectionSettings(3000, 16, "chebyshev")
    cold = select_principal(weight, settings)
    warm = select_principal(weight, settings, cold.subspace)
    assert warm.products < cold.products / 2
    assert torch.isin(warm.index, cold.index).float().mean() > 0.99
    # A subspace of another matrix's shape is none of this one's.
    assert cold.subspace is not None
    other = select_principal(weight, settings, cold.subspace[:-1])
    assert (other.products, other.rounds) == (cold.products, cold.rounds)
    assert torch.equal(other.index, cold.index)


def test_a_checkpoint_gives_them_back(tmp_path: Path) -> None:
    saved = attached()
    commit(saved, tmp_path)
    fresh = attached(lift_ds.LiftConfig(budget_rank=3, lra_rank=4, solver="gram"))
    subspaces.restore(fresh, tmp_path)
    expected = require_attachment(saved).subspaces
    found = require_attachment(fresh).subspaces
    assert found.keys() == expected.keys() == SIDES.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_checkpoint_without_them_leaves_none(tmp_path: Path) -> None:
    commit(attached(lift_ds.LiftConfig(budget_rank=3, lra_rank=4, solver="gram")), tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    model = attached()
    subspaces.restore(model, tmp_path)
    assert require_attachment(model).subspaces == {}


def test_saving_again_on_fewer_ranks_leaves_none_of_the_others(tmp_path: Path) -> None:
    commit(attached(), tmp_path)
    (first,) = rank_files.paths(rank_files.SUBSPACES, tmp_path)
    first.rename(tmp_path / first.name.replace("00000", "00003"))
    commit(attached(), tmp_path)
    assert [path.name for path in rank_files.paths(rank_files.SUBSPACES, tmp_path)] == [first.name]
    assert load_file(first).keys() == SIDES.keys()


def test_when_a_matrix_is_refreshed_does_not_depend_on_the_ranks() -> None:
    config = lift_ds.LiftConfig(density=0.1, lra_rank=4, refresh_interval=10, refresh_parts=3)
    for ranks in (1, 2, 3, 5):
        sizes = {name: MatrixSize.of(shape, 4) for name, shape in Matrices.SHAPES.items()}
        plan = plan_refresh(sizes, config, ranks, collected=False, device_type="cpu")
        times = {offset: sorted(name for jobs in part for name in jobs) for offset, part in plan.parts.items()}
        assert times == {0: ["tall"], 3: ["wide"], 6: ["square", "whole"]}
        assert sorted(name for rank in range(ranks) for name in plan.jobs_of(rank)) == sorted(Matrices.SHAPES)
        most = max(len(plan.jobs_of(rank)) for rank in range(ranks))
        assert most == -(-4 // ranks), "one rank selects in all parts"
    due = [step for step in range(31) if plan.due(step) is not None]
    assert due == [10, 13, 16, 20, 23, 26, 30], "the first selections last for a whole interval"
    assert [step for step in due if plan.completes(step)] == [16, 26]
