"""Pins deltas: applied to its base, one gives the tuned model back to the bit, in files of the same names; what LIFT
changed is what was ever selected; whatever does not fit or is damaged is refused by name, and nothing is left of it;
several deltas meet as they are told to; and memory does not grow with the model.

Models are compared by their bits, so that NaN and -0.0 count.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from cases import loss_of, small_llama
from helpers import bits, same_bits
from safetensors.torch import load_file, save_file
from saved_models import (
    NORM,
    Q,
    altered,
    contents,
    model_in,
    perturb,
    refused,
    rewrite,
    same_files,
    state,
)
from torch import Tensor

import lift_ds
from lift_ds import cli
from lift_ds.delta import DeltaFile, apply_deltas, export_delta, inspect_delta, is_delta, tensors
from lift_ds.delta.layout import read_header
from lift_ds.runtime.files import whole_file, whole_folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model in bf16, in several files, and a copy that was changed; nothing writes in them."""
    folder = tmp_path_factory.mktemp("pair")
    base = model_in(folder / "base", torch.bfloat16, "20KB")
    tuned = Path(shutil.copytree(base, folder / "tuned"))
    rewrite(tuned, perturb)
    return base, tuned


@pytest.fixture(scope="module")
def delta(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_delta(str(pair[0]), str(pair[1]), tmp_path_factory.mktemp("delta") / "delta.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_a_delta_gives_the_tuned_model_back_to_the_bit(
    dtype: torch.dtype, shard_size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a zero changes its sign, a NaN stays or changes its bits, a tensor changes as a whole, in pieces."""
    monkeypatch.setattr(tensors, "PIECE", 1000)  # so that tensors have several
    base = model_in(tmp_path / "base", dtype, shard_size)
    assert len(contents(base)) > 1 or shard_size == "5GB"

    def prepare(file: dict[str, Tensor], changed: bool) -> None:
        if Q in file:
            flat = file[Q].view(-1)
            flat[:3] = torch.tensor([float("nan"), float("nan"), -0.0 if changed else 0.0])
            bits(flat)[1] ^= int(changed)  # another NaN
        if NORM in file and changed:
            file[NORM] += 1

    rewrite(base, lambda file: prepare(file, False))
    tuned = Path(shutil.copytree(base, tmp_path / "tuned"))
    rewrite(tuned, lambda file: prepare(file, True))
    rewrite(tuned, lambda file: perturb({name: tensor for name, tensor in file.items() if name != Q}))

    file = export_delta(str(base), str(tuned), tmp_path / "delta.safetensors")
    again = apply_deltas(str(base), [file], tmp_path / "again")
    assert same_files(contents(again), contents(tuned))
    kept = {path.name for path in base.iterdir()} - {"README.md"}  # which is about the base
    assert {path.name for path in again.iterdir()} == kept
    for name in kept - contents(base).keys():
        assert (again / name).read_text() == (base / name).read_text()
    said = inspect_delta(file).changes
    assert (said[Q].kind, said[Q].changed) == ("sparse", 2)
    assert said[NORM].kind == "whole"
    assert said["model.layers.0.input_layernorm.weight"].kind == "same"
    with_aligned_data(file)
    small_llama().from_pretrained(again)


def with_aligned_data(file: Path) -> None:
    """Each tensor begins where a number of its size may."""
    entries, _, header = read_header(file)
    assert len(header) % 8 == 0
    start = 0
    for entry in entries.values():
        assert start % max(1, entry.size // max(1, entry.entries)) == 0
        start += entry.size


def test_tensors_that_one_model_lacks_come_and_go(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """As where the head of a model with tied weights is in one of the files alone."""
    base = pair[0]
    tuned = Path(shutil.copytree(base, tmp_path / "tuned"))
    last = sorted(contents(base))[-1]
    rewrite(tuned, lambda file: file.pop("lm_head.weight", None))
    added = torch.arange(6).reshape(2, 3)
    save_file({**load_file(tuned / last), "new.ids": added}, tuned / last, {"format": "pt"})
    file = export_delta(str(base), str(tuned), tmp_path / "delta.safetensors")
    again = apply_deltas(str(base), [file], tmp_path / "again")
    got, want = state(again), state(tuned)
    assert got.keys() == want.keys()
    assert all(same_bits(got[name], want[name]) for name in want)
    index = json.loads((again / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, held in contents(again).items() for name in held}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in want.values())


def test_what_lift_changed_is_what_was_ever_selected(tmp_path: Path) -> None:
    """At 5% in bf16 a refresh each step. An entry takes 6 bytes, 3 times a value's, and a header some besides."""
    model = small_llama(torch.bfloat16, hidden_size=128, intermediate_size=256)
    model.save_pretrained(tmp_path / "base")
    config = lift_ds.LiftConfig(density=0.05, lra_rank=4, refresh_interval=2, solver="gram", lr=1e-2)
    lift_ds.attach(model, config)
    optimizer = lift_ds.LiftAdamW(model, lr=config.lr)
    ever: dict[str, set[int]] = {}
    for step in range(5):
        for name, layer in lift_ds.model.attachment.require_attachment(model).weights.items():
            ever.setdefault(f"{name}.weight", set()).update(layer.principal_index.tolist())
        loss_of(model, "llama", step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(lift_ds.refreshes(model)) == 2
    lift_ds.detach(model)
    model.save_pretrained(tmp_path / "tuned")

    file = export_delta(str(tmp_path / "base"), str(tmp_path / "tuned"), tmp_path / "delta.safetensors")
    found = DeltaFile(file)
    changed = [name for name, change in found.changes.items() if change.kind != "same"]
    assert sorted(changed) == sorted(ever)
    for name in changed:
        indices, values = found.read(name)
        assert indices is not None
        assert indices.dtype == torch.int32
        assert values.dtype == torch.bfloat16
        assert set(indices.tolist()) <= ever[name]
        assert len(indices) > 0.8 * len(ever[name])  # a step may leave an entry of bf16 as it is
    again = apply_deltas(str(tmp_path / "base"), [file], tmp_path / "again")
    assert same_files(contents(again), contents(tmp_path / "tuned"))

    entries = sum(change.changed for change in found.changes.values())
    header = len(read_header(file)[2]) + 8
    assert file.stat().st_size == 6 * entries + header
    in_model = sum(tensor.numel() for tensor in state(tmp_path / "tuned").values())
    share = sum(map(len, ever.values())) / in_model
    assert 6 * entries <= 2.1 * share * 1.5 * 2 * in_model


def reshape(file: dict[str, Tensor]) -> None:
    if Q in file:
        file[Q] = file[Q][:8].clone()


def widen(file: dict[str, Tensor]) -> None:
    if Q in file:
        file[Q] = file[Q].float()


def flip_a_bit(file: dict[str, Tensor]) -> None:
    if Q in file:
        file[Q].view(torch.int16)[-1, -1] ^= 1


def rename(file: dict[str, Tensor]) -> None:
    if Q in file:
        file["other"] = file.pop(Q)


def add(file: dict[str, Tensor]) -> None:
    if Q in file:
        file["other"] = torch.zeros(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (reshape, f"{Q} has the shape [8, 32] in TUNED and [32, 32] in BASE"),
        (widen, f"{Q} is F32 in TUNED and BF16 in BASE; a delta changes no dtype, so convert"),
    ],
)
def test_models_that_do_not_compare_are_refused(
    change: Callable[[dict[str, Tensor]], object], message: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    tuned = altered(pair[1], tmp_path / "tuned", change)
    said = refused("export", pair[0], tuned, "--output", tmp_path / "delta")
    assert message in said.replace(str(tuned), "TUNED").replace(str(pair[0]), "BASE")
    assert [path.name for path in tmp_path.iterdir()] == ["tuned"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip_a_bit, f"{Q} has another checksum"),
        (reshape, f"{Q} is BF16 [8, 32], and was BF16 [32, 32]"),
        (widen, f"{Q} is F32 [32, 32], and was BF16 [32, 32]"),
        (rename, f"has no tensor {Q}"),
        (add, "has a tensor other, which that model lacks"),
    ],
)
def test_another_base_is_refused(
    change: Callable[[dict[str, Tensor]], object], message: str, pair: tuple[Path, Path], delta: Path, tmp_path: Path
) -> None:
    other = altered(pair[0], tmp_path / "other", change)
    said = refused("apply", other, delta, "--output", tmp_path / "out")
    assert message in said
    assert str(delta) in said
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_every_flipped_byte_is_noticed(delta: Path, tmp_path: Path) -> None:
    """Each byte of the header's length, and one in 97 of header and data."""
    whole = delta.read_bytes()
    damaged = tmp_path / "damaged"
    for place in [*range(8), *range(8, len(whole), 97), len(whole) - 1]:
        damaged.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"damaged|no whole safetensors file|no delta"):
            inspect_delta(damaged)


def test_damaged_files_write_nothing(pair: tuple[Path, Path], delta: Path, tmp_path: Path) -> None:
    whole = delta.read_bytes()
    damaged = tmp_path / "damaged"
    start = int.from_bytes(whole[:8], "little") + 8
    for content, message in (
        (whole[:-1], "no whole safetensors file"),
        (whole + b"0", "no whole safetensors file"),
        (whole[:5], "no whole safetensors file"),
        (whole[:start] + bytes([whole[start] ^ 1]) + whole[start + 1 :], "is damaged: what it holds of model."),
        (whole.replace(b'"base":"', b'"base":"/', 1), "no whole safetensors file"),
        (whole.replace(str(pair[0]).encode(), str(pair[0]).upper().encode(), 1), "is damaged: its header"),
    ):
        damaged.write_bytes(content)
        said = refused("apply", pair[0], damaged, "--output", tmp_path / "out")
        assert message in said
        assert str(damaged) in said
        assert list(tmp_path.iterdir()) == [damaged]


def test_a_file_and_a_folder_are_there_whole_or_not_at_all(tmp_path: Path) -> None:
    """An error on the way leaves what was there before, and nothing else."""
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("before")

    def fail(error: type[BaseException], half: Path) -> None:
        half.write_text("half")
        raise error

    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), whole_file(file) as unfinished:
            fail(error, unfinished)
        with pytest.raises(error), whole_folder(folder) as unfinished:
            fail(error, unfinished / "half")
        assert list(tmp_path.iterdir()) == [file]
        assert file.read_text() == "before"
    with whole_file(file) as unfinished:
        unfinished.write_text("after")
    with whole_folder(folder) as unfinished:
        (unfinished / "all").write_text("after")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["all", "file", "folder"]
    assert file.read_text() == "after"


def test_what_else_is_refused_says_why(pair: tuple[Path, Path], delta: Path, tmp_path: Path) -> None:
    base, tuned = map(str, pair)
    (tmp_path / "empty").mkdir()
    (tmp_path / "stopped").mkdir()
    shutil.copy(pair[0] / "model.safetensors.index.json", tmp_path / "stopped")
    half = Path(shutil.copytree(base, tmp_path / "half"))
    file = next(half.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-4])
    before = sorted(tmp_path.iterdir())
    out = tmp_path / "out"
    for arguments, message in (
        (("export", base, tmp_path / "empty", "--output", out), "has neither model.safetensors nor"),
        (("export", base, tmp_path / "stopped", "--output", out), "which is not there"),
        (("export", base, half, "--output", out), f"{file} is no whole safetensors file"),
        (("export", "./gone", tuned, "--output", out), "./gone: there is no such folder"),
        (("export", "some/name", tuned, "--output", out), "some/name is no folder, and cannot be had from the Hub"),
        (("export", base, delta, "--output", out), "is a file; give a folder"),
        (("export", base, tuned, "--output", tmp_path), "it must be no folder"),
        (("export", base, tuned, "--output", tmp_path / "gone" / "x"), "its folder must be there"),
        (("export", base, tuned, "--output", Path(tuned) / file.name), f"is a file of {tuned}"),
        (("apply", base, next(pair[0].glob("*.safetensors")), "--output", out), "is a safetensors file, and no delta"),
        (("apply", base, tmp_path / "gone", "--output", out), "there is no such file"),
        (("apply", base, delta, "--output", tmp_path / "half"), "is there already"),
        (("apply", base, delta, "--output", tmp_path / "gone" / "x"), "the folder it would be in is not there"),
        (("inspect", tmp_path / "gone"), "there is no such file"),
    ):
        assert message in refused(*arguments)
    assert sorted(tmp_path.iterdir()) == before


def scattered(folder: Path, to: Path, values: Mapping[int, float]) -> Path:
    """A copy of a model with these entries of one matrix changed; its delta."""

    def put(file: dict[str, Tensor]) -> None:
        if Q in file:
            for place, value in values.items():
                file[Q].view(-1)[place] = value

    tuned = altered(folder, to, put)
    return export_delta(str(folder), str(tuned), to.with_suffix(".delta"))


def test_deltas_meet_as_they_are_told(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Entries that one of them changes, or that get the same bits, are no conflict."""
    base = pair[0]
    first = scattered(base, tmp_path / "a", {0: 1.0, 5: 2.0, 7: 3.0})
    second = scattered(base, tmp_path / "b", {5: 2.0, 7: 3.5, 9: 5.0})
    apart = scattered(base, tmp_path / "c", {5: 2.0, 1000: 8.0})
    whole = scattered(base, tmp_path / "d", dict.fromkeys(range(900), 6.0))
    assert inspect_delta(whole).changes[Q].kind == "whole"

    def applied(rule: str, *files: Path) -> Tensor:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return state(apply_deltas(str(base), files, tmp_path / "out", rule))[Q].view(-1)

    old = state(base)[Q].view(-1)
    together = applied("error", first, apart)
    expected = old.clone()
    expected[torch.tensor([0, 5, 7, 1000])] = torch.tensor([1.0, 2, 3, 8]).bfloat16()
    assert same_bits(together, expected)

    shutil.rmtree(tmp_path / "out")
    said = refused("apply", base, first, second, "--output", tmp_path / "out")
    assert (
        f"the deltas meet in {Q}: {first}, {second} give 1 of its 1024 entries different values, by up to 0.5" in said
    )
    assert not (tmp_path / "out").exists()

    expected = old.clone()
    expected[torch.tensor([0, 5, 7, 9])] = torch.tensor([1.0, 2, 3.5, 5]).bfloat16()
    assert same_bits(applied("last", first, second), expected)
    expected[7] = 3.25
    assert same_bits(applied("mean", first, second), expected)
    expected[:900] = 6.0
    expected[torch.tensor([0, 5, 7, 9])] = torch.tensor([7 / 2, 10 / 3, 12.5 / 3, 11 / 2]).bfloat16()
    assert same_bits(applied("mean", first, second, whole), expected)
    assert applied("last", whole, first)[7] == 3.0
    with pytest.raises(ValueError, match="valid are error, last, mean"):
        applied("first", first)


def test_only_what_is_there_in_both_can_meet(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base = pair[0]
    removed = altered(base, tmp_path / "removed", lambda file: file.pop(Q, None))
    removed = export_delta(str(base), str(removed), tmp_path / "removed.delta")
    changed = scattered(base, tmp_path / "changed", {0: 1.0})
    assert f"{Q} is removed by one of" in refused("apply", base, changed, removed, "--output", tmp_path / "out")
    files = [adding(base, tmp_path / str(value), value) for value in (1, 2)]
    assert "the deltas meet in new: " in refused("apply", base, *files, "--output", tmp_path / "out")
    again = apply_deltas(str(base), files, tmp_path / "out", "last")
    assert state(again)["new"].tolist() == [2, 2]
    assert "of which there is no mean" in refused(
        "apply", base, *files, "--output", tmp_path / "mean", "--on-conflict", "mean"
    )


def adding(folder: Path, to: Path, value: int) -> Path:
    """A copy of a model with one tensor more; its delta."""

    def put(file: dict[str, Tensor]) -> None:
        if Q in file:
            file["new"] = torch.full((2,), value)

    return export_delta(str(folder), str(altered(folder, to, put)), to.with_suffix(".delta"))


def test_the_commands_say_what_they_did(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = map(str, pair)
    assert cli.main(["export", base, tuned, "--output", str(tmp_path / "delta")]) == 0
    matrices = [tensor for tensor in state(pair[0]).values() if tensor.dim() == 2]
    changed = sum(round(0.05 * tensor.numel()) for tensor in matrices)
    said = capsys.readouterr().out
    assert f"written to {tmp_path / 'delta'}: {changed:,} of " in said
    assert f"in {len(matrices)} of {len(state(pair[0]))} tensors" in said
    assert is_delta(tmp_path / "delta")
    assert cli.main(["inspect", str(tmp_path / "delta")]) == 0
    said = capsys.readouterr().out
    assert f"base: {base}" in said
    assert f"{Q}  " in said
    assert "4.98%  sparse" in said
    assert cli.main(["apply", base, str(tmp_path / "delta"), "--output", str(tmp_path / "again")]) == 0
    assert same_files(contents(tmp_path / "again"), contents(pair[1]))


_MEASURED = """
import sys
from pathlib import Path
import torch
from lift_ds.delta import apply_deltas, export_delta

def peak_of(action):
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak begins anew
    before = kib("VmRSS")
    action()
    return kib("VmHWM") - before

def kib(what):
    return int(Path("/proc/self/status").read_text().split(what + ":")[1].split()[0])

torch.set_num_threads(1)
base, tuned, delta, again = sys.argv[1:]
export_delta(base, base, delta)  # whatever is loaded when it is first used
print(peak_of(lambda: export_delta(base, tuned, delta)), peak_of(lambda: apply_deltas(base, [delta], again)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's peak of the process")
def test_memory_is_that_of_two_tensors(tmp_path: Path) -> None:
    """Of a model of ten tensors of a size, measured in a process of its own: base, tuned, and what changed."""
    size = 1 << 24  # bytes of a tensor
    for name, value in (("base", 0), ("tuned", 1)):
        (tmp_path / name).mkdir()
        held = {f"{i}.weight": torch.zeros(size // 4, dtype=torch.float32) for i in range(10)}
        for tensor in held.values():
            tensor[::20] = value
        save_file(held, tmp_path / name / "model.safetensors")
    paths = [str(tmp_path / name) for name in ("base", "tuned", "delta", "again")]
    # The C library keeps freed blocks of this size for later, which would be counted too; from 64 KiB it shall not.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", _MEASURED, *paths]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert ended.returncode == 0, ended.stderr
    exported, applied = (int(number) * 1024 / size for number in ended.stdout.split())
    assert 1 < exported < 2.5
    assert 1 < applied < 2.5
