"""Pins down the scaling study without a launch: which cells a grid has and in which order, what is refused, that rows
go through the CSV and are not run again, what speed-up and efficiency are, and what the planner predicts from.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scaling import command, predict, runners
from benchmarks.scaling.cells import BASE, NO_LINK, PROBE, STRONG, WEAK, Cell, Grid, Sizes, make_grid
from benchmarks.scaling.report import write_report
from benchmarks.scaling.runners import CellError
from benchmarks.scaling.summary import comparisons, scalings, summarise
from benchmarks.scaling.table import FAILED, OK, Row, cell_of, left_to_do, read_rows, row_of, with_row, write_rows
from lift_ds.planner import speed

SIZES = Sizes(hidden=64, intermediate=176, layers=2, vocabulary=64, sequence=16, density=0.05)
GRID = Grid(
    methods=("full", "lift"), stages=(2,), ranks=(1, 2, 4), nodes=(1, 2), scaling=(STRONG, WEAK), tokens=128,
    sizes=SIZES, link="slow", gbit=0.2, steps=3, repetitions=2,
)  # fmt: skip


def measured(cell: Cell, seconds: float, **more: Any) -> Row:
    """A row of a cell that took these seconds a step."""
    row = row_of(cell) | {
        "status": OK, "step_seconds": seconds, "step_seconds_min": seconds * 0.9, "step_seconds_max": seconds * 1.1,
        "forward_seconds": seconds / 10, "backward_seconds": seconds / 2, "optimizer_seconds": seconds * 0.4,
        "wire_bytes_sent": 1e6, "wire_bytes_received": 2e6, "device": "cpu", "cpu": "some", "cores": 2,
        "load_average": 0.5, "date": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return row | more


def cells(**changes: Any) -> list[Cell]:
    return make_grid(replace(GRID, **changes))


def test_a_grid_has_every_combination_once_and_calibrates_first() -> None:
    found = cells()
    assert len(found) == len(set(found)) == len({cell.key for cell in found})
    assert [str(cell) for cell in found[:2]] == [
        f"{method} ZeRO-2 base, 1 node, 1 rank, link none, 128 tokens a rank, repetition 0"
        for method in ("full", "lift")
    ]
    trained = {(c.method, c.nodes, c.ranks, c.scaling, c.repetition) for c in found if c.method != PROBE}
    several = {(n, r, s) for (n, r), s in itertools.product([(1, 2), (1, 4), (2, 2), (2, 4)], (STRONG, WEAK))}
    expected = {(1, 1, BASE), *several}
    assert trained == {(m, *rest, i) for m in ("full", "lift") for rest in expected for i in (0, 1)}
    assert {(c.link, c.gbit) for c in found if c.nodes == 2} == {("slow", 0.2)}
    assert {(c.link, c.gbit) for c in found if c.nodes == 1} == {(NO_LINK, None)}


def test_methods_alternate_and_repetitions_come_last() -> None:
    found = [cell for cell in cells(scaling=(WEAK,)) if cell.ranks > 1 and cell.method != PROBE]
    assert [cell.method for cell in found] == ["full", "lift"] * (len(found) // 2)
    assert [cell.repetition for cell in found] == sorted(cell.repetition for cell in found)


def test_strong_scaling_shares_the_tokens_and_weak_gives_each_rank_as_many() -> None:
    tokens = {(cell.ranks, cell.scaling): cell.tokens for cell in cells() if cell.method == "full"}
    assert tokens == {(1, BASE): 128, (2, STRONG): 64, (4, STRONG): 32, (2, WEAK): 128, (4, WEAK): 128}


def test_links_are_probed_only_where_no_rate_is_given() -> None:
    def probed(gbit: float | None) -> set[tuple[int, int]]:
        return {(cell.nodes, cell.ranks) for cell in cells(gbit=gbit) if cell.method == PROBE}

    assert probed(0.2) == {(1, 2), (1, 4)}
    assert probed(None) == {(1, 2), (1, 4), (2, 2), (2, 4)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ranks": (1, 16)}, "--ranks 16: more ranks than the 14 managed matrices"),
        ({"ranks": (1, 3), "nodes": (1,)}, "--tokens 128: 3 rank"),
        ({"ranks": (1, 3), "nodes": (2,)}, "--ranks 1: is a multiple of none of --nodes 2"),
        ({"nodes": (1, 3)}, "--nodes 3: none of --ranks 1 2 4"),
        ({"ranks": (0,)}, "--ranks 0: take a whole number of at least 1"),
        ({"tokens": 100}, "--tokens 100: 1 rank"),
        ({"gbit": -1.0}, "--link-gbit -1.0"),
        ({"link": "my link"}, "--link-name 'my link'"),
        ({"sizes": replace(SIZES, density=0.0)}, "--density 0.0"),
        ({"sizes": replace(SIZES, hidden=100)}, "--hidden 100"),
    ],
)
def test_what_cannot_run_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        cells(**changes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", "1", "99"], "--ranks 99: more ranks than the 49"),
        (["--nodes", "2", "--ranks", "2"], "--nodes 2: --launcher local has one node"),
        (["--launcher", "hostfile", "--hostfile", "absent"], "--hostfile absent: there is no such file"),
        (["--ranks", "1", "1"], "--ranks: 1 is there twice"),
    ],
)
def test_the_command_refuses_in_one_line(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(None, [*arguments, "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {words}")
    assert said.count("\n") == 1


def test_a_hostfile_is_read_and_its_faults_are_named(tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_text("# two\nnode1 slots=2\n\nnode2 slots=1  # small\n")
    assert runners.read_hostfile(path) == {"node1": 2, "node2": 1}
    with pytest.raises(ValueError, match=r"2 ranks on node2: .* has slots=1"):
        runners.Hosts(path).check(2, 2, tmp_path)
    with pytest.raises(ValueError, match=r"--nodes 3: .* has 2 host"):
        runners.Hosts(path).check(3, 1, tmp_path)
    for text, words in (("", "names no host"), ("node1", "is not a host's"), ("a slots=1\na slots=2", "is not a host")):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            runners.read_hostfile(path)


def test_rows_go_through_the_csv(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "rows.csv"
    assert read_rows(path) == []
    failed = row_of(cells()[1]) | {"status": FAILED, "error": 'it said "no", twice,\nand ended'}
    rows = [measured(cells()[0], 0.123456789, wire_bytes_sent=123456789.0, peak_bytes=3), failed]
    write_rows(path, rows)
    assert read_rows(path) == rows
    text = path.read_text()
    write_rows(path, read_rows(path))
    assert path.read_text() == text
    assert cell_of(read_rows(path)[0]) == cells()[0]
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="columns are not those of a study"):
        read_rows(path)


def test_what_has_a_row_is_not_run_again_and_failures_only_when_asked() -> None:
    todo = cells()
    failed = row_of(todo[1]) | {"status": FAILED}
    rows = [measured(replace(todo[0], steps=99, gbit=None), 1.0), failed]
    assert left_to_do(todo, rows, retry=False) == todo[2:]
    assert left_to_do(todo, rows, retry=True) == todo[1:]
    again = with_row(rows, measured(todo[1], 2.0))
    assert [row["status"] for row in again] == [OK, OK]
    other = [replace(cell, link="fast") for cell in todo if cell.nodes > 1]
    assert left_to_do(other, [measured(cell, 1.0) for cell in todo], retry=False) == other


def test_a_study_continues_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Cell] = []

    def run_job(runner: Any, job: Any, folder: Path) -> dict[str, Any]:
        folder.mkdir(parents=True, exist_ok=True)
        ran.append(job.cell)
        if len(ran) == 2:
            raise CellError("rank 0 ended with -9: no output")
        if len(ran) == 4:
            raise KeyboardInterrupt
        around = {"hardware": {"cpu": "some", "cores": 2}, "versions": {"torch": "2"}, "date": "2026-01-01"}
        found = {"seconds": [0.1, 0.3, 0.2], "phases": [0.05, 0.1, 0.05], "wire_sent": 1e6, "wire_received": 1e6}
        return {**found, "device": "cpu", "load_average": 0.1, "measured_gbit": 8.0, "refresh_seconds": 1.0, **around}

    monkeypatch.setattr(command, "run_job", run_job)
    arguments = ["--methods", "full", "lift", "--ranks", "1", "2", "--scaling", "weak", "--repetitions", "1"]
    arguments += ["--output", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        command.main(None, arguments)
    assert [row["status"] for row in read_rows(tmp_path / "measurements.csv")] == [OK, FAILED, OK]
    assert command.main(None, arguments) == 1  # the failed one is left
    assert ran[3:5] == [ran[3], ran[3]]
    assert len(ran) == 6
    assert "rank 0 ended with -9" in (tmp_path / "report.md").read_text()
    assert command.main(None, [*arguments, "--retry"]) == 0
    assert ran[6:] == [ran[1]]
    rows = read_rows(tmp_path / "measurements.csv")
    assert {(row["step_seconds"], row["step_seconds_min"], row["step_seconds_max"]) for row in rows} == {
        (0.2, 0.1, 0.3)
    }
    assert all(row["predicted_step_seconds"] for row in rows if row["method"] != PROBE)
    assert command.main(None, arguments) == 0
    assert len(ran) == 7


def test_speed_up_and_efficiency() -> None:
    found = {(c.method, c.nodes, c.ranks, c.scaling): c for c in cells(repetitions=1)}
    seconds = {(1, BASE): 1.0, (4, STRONG): 0.5, (4, WEAK): 1.25}
    rows = [measured(found["full", 1, n, kind], s, predicted_step_seconds=s / 2) for (n, kind), s in seconds.items()]
    rows.append(measured(found["lift", 1, 4, WEAK], 0.25))  # without a base of its own
    by_kind = {one.summary.cell.scaling: one for one in scalings(summarise(rows))}
    assert set(by_kind) == {STRONG, WEAK}
    assert len(scalings(summarise(rows))) == 2
    strong, weak = by_kind[STRONG], by_kind[WEAK]
    assert strong.measured == pytest.approx(1.0 / 0.5)
    assert strong.efficiency(strong.measured) == pytest.approx(1.0 / (4 * 0.5))
    assert weak.measured == pytest.approx(4 * 1.0 / 1.25)
    assert weak.efficiency(weak.measured) == pytest.approx(1.0 / 1.25)
    assert strong.predicted == pytest.approx(2.0)


def test_repetitions_are_put_together_and_lift_is_compared() -> None:
    found = [cell for cell in cells() if (cell.nodes, cell.ranks, cell.scaling) == (2, 2, WEAK)]
    rows = [measured(cell, {"full": 4.0, "lift": 0.5}[cell.method] + cell.repetition) for cell in found]
    full, lift = summarise(rows)
    assert (full.cell.method, full.repetitions, full.seconds) == ("full", 2, 4.5)
    assert (full.fastest, full.slowest) == (pytest.approx(3.6), pytest.approx(5.5))
    assert full.wire == 2e6
    assert full.limit == pytest.approx(8 * 2e6 / 0.2e9)
    (compared,) = comparisons([full, lift])
    assert compared.faster == pytest.approx(4.5)
    assert compared.fewer_bytes == pytest.approx(1.0)


def test_the_report_says_what_was_measured_and_predicted(tmp_path: Path) -> None:
    rows = [measured(cell, 1.0 + cell.ranks) for cell in cells() if cell.method != PROBE]
    probe = next(cell for cell in cells() if cell.method == PROBE)
    rows.append(measured(probe, 0.1, measured_gbit=4.0))
    predict.add_predictions(rows, lambda text: None)
    write_report(tmp_path / "report.md", rows, ["links.svg"])
    text = (tmp_path / "report.md").read_text()
    assert "Link slow: 0.2 Gbit/s, as given." in text
    assert "All-reduce of 2 ranks on one node: 4.00 Gbit/s, measured." in text
    assert "| full | 2 | weak | 2 | 2 | slow | 128 | 2 | 3.000 (2.700 to 3.300) |" in text
    assert "![links](links.svg)" in text


def test_predictions_follow_from_the_run_on_one_rank_and_the_rate_of_the_link() -> None:
    found = cells(repetitions=1)
    alone = next(cell for cell in found if cell.ranks == 1)
    calibration = predict.calibrate([measured(alone, 1.0)], SIZES)
    assert calibration is not None
    setting = predict.setting_of(alone, "cpu")
    assert calibration.bandwidth_gb == pytest.approx(1e-9 * speed.optimizer_bytes(setting) / 0.4)
    on_link = next(cell for cell in found if (cell.method, cell.nodes, cell.ranks) == ("full", 2, 2))
    hardware = predict.hardware_for(on_link, calibration)
    predicted = predict.predict(on_link, "cpu", hardware)
    # ZeRO-2 on two ranks: gradients all-reduced, 2 bytes each and rank; values gathered, half of 2 bytes.
    assert predicted["predicted_wire_bytes"] == pytest.approx(3 * SIZES.managed)
    assert predicted["predicted_network_seconds"] == pytest.approx(8 * 3 * SIZES.managed / 0.2e9)
    parts = ("compute", "network", "optimizer")
    assert predicted["predicted_step_seconds"] == pytest.approx(sum(predicted[f"predicted_{p}_seconds"] for p in parts))
    # One full step on one rank is what was calibrated by: it comes out as measured.
    same = predict.predict(alone, "cpu", predict.hardware_for(alone, calibration))
    assert same["predicted_step_seconds"] == pytest.approx(1.0)


def test_more_ranks_than_cores_share_the_speed_of_a_node() -> None:
    calibration = predict.Calibration(0.1, 10.0, None, {(1, 4, NO_LINK): 1.0}, cores=2)
    four = next(cell for cell in cells() if (cell.nodes, cell.ranks) == (1, 4) and cell.method == "full")
    hardware = predict.hardware_for(four, calibration)
    assert hardware is not None
    assert (hardware.tflops, hardware.bandwidth_gb) == (0.05, 5.0)
    assert predict.hardware_for(replace(four, ranks=2), calibration) is None  # no rate is known for two
    on_nodes = replace(four, nodes=2, link="slow", gbit=0.2)
    hardware = predict.hardware_for(on_nodes, calibration)
    assert hardware is not None
    assert (hardware.tflops, hardware.inter_gb) == (0.1, 0.025)


def test_a_job_of_slurm_starts_one_task_on_each_node(tmp_path: Path) -> None:
    cell = next(cell for cell in cells() if cell.nodes == 2)
    job = runners.Job(cell, "cpu", "eth0", 1, 60.0, {})
    script = runners.batch_script(job, tmp_path)
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n" in script
    assert '--node "$SLURM_NODEID" --address "$HEAD"' in script


def test_the_optimizers_bytes_are_of_the_entries_that_a_rank_updates() -> None:
    one, two = (
        predict.setting_of(next(c for c in cells() if (c.method, c.nodes, c.ranks) == ("full", n, n)), "cpu")
        for n in (1, 2)
    )
    assert speed.optimizer_bytes(one) == 2 * speed.optimizer_bytes(two) == 74 * SIZES.managed
    # Every rank copies all gradients into its buckets and divides them; each entry is copied out twice by one rank.
    assert (speed.gradient_bytes(one), speed.gradient_bytes(two)) == (16 * SIZES.managed, 12 * SIZES.managed)
    assert speed.optimizer_bytes(replace(one, offload=True)) == 30 * SIZES.managed


def test_gloo_sends_a_reduce_scatter_twice() -> None:
    cell = next(cell for cell in cells(stages=(3,)) if (cell.method, cell.nodes, cell.ranks) == ("full", 2, 2))
    twice, once = (predict.predict(cell, device, None)["predicted_wire_bytes"] for device in ("cpu", "H100"))
    assert twice - once == pytest.approx(SIZES.managed)  # half of 2 bytes an entry
