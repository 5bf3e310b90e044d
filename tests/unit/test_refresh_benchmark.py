"""Pins down that benchmarks/refresh.py runs every method on every kind of matrix and on saved weights, that its exit
code is the verdict of its budgets, and that budgets are judged where they ought to be.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.measure.spectra import SPECTRA

pytest.importorskip("matplotlib")

from benchmarks import refresh
from benchmarks.measure.selecting import METHODS


@pytest.fixture(autouse=True)
def threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    output = folder / "refresh.json"
    code = refresh.main(["--quick", "--threads", "1", *arguments, "--output", str(output)])
    return code, json.loads(output.read_text())


def entry(**changes: Any) -> dict[str, Any]:
    """A record that meets every budget it is judged by."""
    values: dict[str, Any] = {
        "matrix": "trained-like", "shape": [2048, 5504], "lra_rank": 128, "method": "chebyshev cold", "seconds": 1.0,
        "overlap": 0.998, "estimate": 0.002, "determined": True, "peak_bytes": 10**8,
    }  # fmt: skip
    return {**values, **changes}


def failed(*records: dict[str, Any]) -> list[str]:
    slow = entry(method="baseline", seconds=20.0, estimate=None)
    return [judged["budget"] for judged in refresh.budgets([slow, *records]) if not judged["pass"]]


def test_every_method_runs_on_every_kind_of_matrix(tmp_path: Path) -> None:
    code, found = run(tmp_path, "--matrices", "all")
    ran = {(r["matrix"], r["method"]) for r in found["records"]}
    assert ran == {(name, method) for name in SPECTRA for method in METHODS}
    assert code == (0 if all(judged["pass"] for judged in found["budgets"]) else 1)
    first = [r for r in found["records"] if r["matrix"] == found["records"][0]["matrix"]]
    assert all(r["peak_bytes"] > 0 for r in first)
    assert all(
        r["overlap"] > 0.995 for r in found["records"] if r["method"] in ("baseline", "gram") and r["determined"]
    )
    assert (tmp_path / "refresh.svg").read_text().startswith("<?xml")


def test_saved_weights_are_run_without_embeddings_and_small_ones(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shapes = {"embed_tokens": (80, 64), "layers.0.up": (96, 64), "layers.0.down": (64, 96), "layers.0.small": (64, 20)}
    save_file({f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    _, found = run(tmp_path, "--weights", str(tmp_path))
    assert {(r["shape"], r["matrices"]) for r in found["records"]} == {("96x64", 1), ("64x96", 1)}
    assert all(r["off, mean"] == r["off, at most"] < 0.005 for r in found["records"] if r["method"] == "gram")
    assert all(r["seconds"] > 0 for r in found["records"])


def test_memory_of_the_largest_matrix_is_counted_beside_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refresh, "_LARGEST", (288, 512))  # as small as rank 128 allows
    _, found = run(tmp_path, "--matrices", "power 0.4", "--methods", "gram", "--largest")
    assert found["records"][-1]["shape"] == [288, 512]
    assert found["records"][-1]["peak_bytes"] > 0
    assert next(judged for judged in found["budgets"] if "bytes" in judged["budget"])["pass"]


def test_a_refresh_of_a_model_is_the_sum_over_its_matrices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(refresh.MODELS, "llama-2-7b", ((2, 96, 64), (1, 64, 160)))
    for whole in ([], ["--whole"]):
        _, found = run(tmp_path, "--model", "llama-2-7b", "--methods", "gram", "chebyshev cold", *whole)
        assert [r["method"] for r in found["records"]] == ["gram", "chebyshev cold"]
        assert all(r["seconds"] > 0 for r in found["records"])


def test_budgets_fail_where_they_are_missed() -> None:
    assert failed(entry()) == []
    assert failed(entry(seconds=20 / 7.9)) == ["times faster than the baseline, at least"]
    assert failed(entry(method="chebyshev warm", seconds=20 / 11)) == ["times faster than the baseline, at least"]
    assert failed(entry(overlap=0.9945)) == ["off the exact selection, at most"]
    dishonest = ["off the exact selection, at most", "off beyond the estimate, at most"]
    assert failed(entry(overlap=0.99)) == dishonest
    assert failed(entry(shape=[8192, 28672], overlap=None, peak_bytes=1.6e9)) == ["bytes beside the matrix, at most"]


def test_budgets_speak_of_what_is_determined_and_of_trained_like_matrices_alone() -> None:
    assert failed(entry(overlap=0.7, determined=False)) == []
    assert failed(entry(seconds=19.0, matrix="gaussian")) == []
    assert failed(entry(seconds=19.0, shape=[2048, 2048])) == []
    assert failed(entry(method="svd_lowrank", overlap=0.6, estimate=None)) == []
