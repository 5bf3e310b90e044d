"""Pins the formulas of benchmarks/footprint.py to the figures of the design, bytes per managed parameter at N = 8; and
that its ledger counts storages, once each and for as long as they live.

One large matrix stands for the model, so that row counts and padding do not show; a density of 5%.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.measure.counting import Ledger
from lift_ds.planner import formulas
from lift_ds.planner.formulas import ring_share

ROWS = COLUMNS = 32000
MANAGED = ROWS * COLUMNS


def setting(method: str, stage: int, **changes: object) -> formulas.Setting:
    """Eight ranks and one matrix, all of it trained or a twentieth."""
    trained = MANAGED if method == "full" else MANAGED // 20
    values: dict[str, object] = {"ranks": 8, "shapes": ((ROWS, COLUMNS),), "trained": (trained,), **changes}
    return formulas.Setting(method=method, stage=stage, **values)  # type: ignore[arg-type]


def held(method: str, stage: int, **changes: object) -> float:
    return sum(formulas.persistent(setting(method, stage, **changes)).values()) / MANAGED


def sent(method: str, stage: int, **changes: object) -> float:
    return sum(formulas.network_step(setting(method, stage, **changes)).values()) / MANAGED


def test_full_fine_tuning_holds_five_and_a_half_bytes_with_whole_gradients() -> None:
    # The design counts gradients whole; after backward a rank has its own partition of them, here of one parameter.
    assert held("full", 2) == pytest.approx(4 + 12 / 8)
    assert held("full", 2, trained=(MANAGED // 64,) * 64) == pytest.approx(2 + 14 / 8)
    assert held("full", 3) == pytest.approx(2.0)


def test_lift_holds_what_the_design_says() -> None:
    assert held("lift", 2) == pytest.approx(2.3, abs=0.02)
    assert held("lift", 3) == pytest.approx(0.36, abs=0.005)


def test_network_of_a_step() -> None:
    assert sent("full", 2) == pytest.approx(4.0)
    assert sent("full", 3) == pytest.approx(6.0)
    assert sent("lift", 2) == pytest.approx(0.3, abs=0.001)
    assert sent("lift", 2, placement="replicated") == pytest.approx(0.2)
    assert sent("lift", 3) / sent("full", 3) < 0.75


def test_a_single_rank_shares_and_gathers_nothing() -> None:
    assert held("lift", 2, ranks=1) == held("lift", 0)
    assert sent("lift", 2, ranks=1) == pytest.approx(0.1)


def test_parameters_cut_by_a_partition_are_held_whole_on_both_sides() -> None:
    halves = setting("full", 2, ranks=2, shapes=((2, 2),) * 3, trained=(4, 4, 4))
    assert formulas.largest_partition(halves) == 8
    assert formulas.largest_partition(setting("full", 2, ranks=2, trained=(4, 4))) == 4


def test_a_ring_over_one_rank_passes_nothing() -> None:
    assert ring_share("all_gather", 1) == ring_share("all_reduce", 1) == 0


def test_a_ring_passes_a_reduced_tensor_twice() -> None:
    assert ring_share("all_reduce", 4) == 2 * ring_share("reduce_scatter", 4) == 1.5


def test_the_ledger_counts_storages_while_they_live() -> None:
    with Ledger(ranks=1) as ledger:
        kept = torch.zeros(1000)
        before = ledger.live_bytes
        with ledger.window() as window:
            passing = torch.zeros(2000)
            view = passing[10:].view(-1)  # shares its storage
            assert ledger.live_bytes == before + 8000
            del passing
            assert ledger.live_bytes == before + 8000
            del view
            after = torch.ones(500)
        assert window.peak_bytes == 8000
        assert ledger.live_bytes == before + after.nbytes
        kept.set_()  # type: ignore[call-overload]
        assert ledger.live_bytes == after.nbytes
