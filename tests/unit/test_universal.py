"""What `python -m lift_ds.universal` refuses, in one line; tests/distributed resumes what it converts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import build

import lift_ds
from lift_ds.checkpoint import DESCRIPTION, Layout, commit, newest
from lift_ds.checkpoint.manifest import read_sealed, write_sealed
from lift_ds.universal import REFUSED, main


def committed(folder: Path, layout: Layout | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save({}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    commit(lift_ds.attach(build("matrices"), lift_ds.LiftConfig(density=0.5, lra_rank=2)), folder, layout=layout)
    return folder


def refusal(capsys: pytest.CaptureFixture[str], *arguments: Path) -> str:
    capsys.readouterr()  # what attaching says
    assert main([str(argument) for argument in arguments]) == REFUSED
    said = capsys.readouterr()
    assert not said.out
    (line,) = said.err.splitlines()
    assert line.startswith("error: ")
    return line


def test_missing_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere' does not exist" in refusal(capsys, tmp_path / "nowhere", tmp_path / "out")


def test_interrupted_save(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = committed(tmp_path / "saved")
    (source / DESCRIPTION).unlink()
    assert "lift.json is missing" in refusal(capsys, source, tmp_path / "out")


def test_damaged_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = committed(tmp_path / "saved", Layout(1, 2))
    (file,) = source.glob("*.pt")
    file.write_bytes(file.read_bytes()[::-1])
    assert f"{file}: its content is not what was saved" in refusal(capsys, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_target_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = committed(tmp_path / "saved")
    assert "exists and is not empty" in refusal(capsys, source, source)


def test_universal_already(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = committed(tmp_path / "saved")
    write_sealed(source / DESCRIPTION, {**read_sealed(source / DESCRIPTION, 2), "universal": True})
    assert "is a universal checkpoint already" in refusal(capsys, source, tmp_path / "out")


def test_nothing_is_shared_out_without_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = committed(tmp_path / "saved")
    assert "stage 0; that loads on any number of ranks as it is" in refusal(capsys, source, tmp_path / "out")
    (source / "zero_pp_rank_0_mp_rank_00_optim_states.pt").rename(source / "optimizer.pt")
    commit(lift_ds.attach(build("matrices"), lift_ds.LiftConfig(density=0.5, lra_rank=2)), source)
    assert "holds no states of DeepSpeed's ZeRO" in refusal(capsys, source, tmp_path / "out")


def test_files_of_a_rank_that_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = committed(tmp_path / "saved", Layout(2, 2))
    assert "mp_rank_00_model_states.pt is missing" in refusal(capsys, source, tmp_path / "out")
    assert newest([tmp_path / "out"]).taken is None
