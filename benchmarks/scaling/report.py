"""The report of a study in Markdown: what was calibrated, measured beside predicted, speed-up and efficiency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure.tables import markdown_table
from benchmarks.scaling.cells import Cell, Sizes
from benchmarks.scaling.predict import calibrate
from benchmarks.scaling.summary import Summary, comparisons, scalings, summarise
from benchmarks.scaling.table import FAILED, OK, Row, cell_of

_WHERE = ("method", "ZeRO", "scaling", "nodes", "ranks", "link", "tokens/rank")


def write_report(path: Path, rows: Sequence[Row], pictures: Sequence[str]) -> None:
    """Write the report.

    Args:
        path: of the file.
        rows: of the study, predictions filled in.
        pictures: names of the plots beside it.
    """
    parts = ["# Scaling study", _surroundings(rows)]
    parts += [f"![{name.removesuffix('.svg')}]({name})" for name in pictures]
    for sizes in dict.fromkeys(cell_of(row).sizes for row in rows):
        parts += _of_sizes(sizes, [row for row in rows if cell_of(row).sizes == sizes])
    failed = [f"- {cell_of(row)}: {row['error']}" for row in rows if row["status"] == FAILED]
    if failed:
        parts += ["## Failed", "\n".join(failed)]
    path.write_text("\n\n".join(parts) + "\n")


def _surroundings(rows: Sequence[Row]) -> str:
    measured = [row for row in rows if row["status"] == OK]
    lines = []
    for title, names in {
        "Processor": ("cpu", "cores"), "Device": ("device",), "Launcher": ("launcher",),
        "Threads a rank": ("threads_per_rank",), "torch": ("torch",), "DeepSpeed": ("deepspeed",),
        "transformers": ("transformers",), "PEFT": ("peft",), "Python": ("python",),
    }.items():  # fmt: skip
        values = dict.fromkeys(", ".join(str(row[name]) for name in names) for row in measured)
        lines.append(f"- {title}: {'; '.join(values)}" + (" cores" if "cores" in names else ""))
    dates = sorted(row["date"] for row in measured)
    loads = sorted(row["load_average"] for row in measured)
    if dates:
        lines.append(f"- Date: {dates[0]} to {dates[-1]}")
        lines.append(f"- Load average of the machine at the start of a run: {loads[0]:.1f} to {loads[-1]:.1f}")
    return "\n".join(lines)


def _of_sizes(sizes: Sizes, rows: Sequence[Row]) -> list[str]:
    found = summarise(rows)
    parts = [
        f"## {sizes.managed / 1e6:.1f} million managed parameters",
        f"Hidden size {sizes.hidden}, intermediate size {sizes.intermediate}, {sizes.layers} layers, vocabulary "
        f"{sizes.vocabulary}, sequences of {sizes.sequence} tokens, density {sizes.density:g}, LoRA of rank "
        f"{sizes.lora_rank}.",
        _calibration(sizes, rows),
        "### Measured and predicted",
        "Seconds of a step: median of the runs' medians, and the fastest and slowest step of all. MB: 10^6 bytes on "
        "the wire that a node sends or receives in a step, whichever is more; on one node the bytes of all its ranks. "
        "Limit: those bytes at the given rate of the link.",
        _measured(found),
    ]
    if scaled := scalings(found):
        rows_ = [
            [*_where(one.summary.cell), f"{one.base.seconds:.3f}", f"{one.summary.seconds:.3f}",
             f"{one.measured:.2f}", f"{one.efficiency(one.measured):.2f}", _number(one.predicted, 2),
             _number(one.efficiency(one.predicted) if one.predicted else None, 2)]
            for one in scaled
        ]  # fmt: skip
        head = [*_WHERE, "one rank, s", "s", "speed-up", "efficiency", "predicted speed-up", "predicted efficiency"]
        text = "Speed-up: tokens a second over those of one rank. Efficiency: t1 / (N tN) strong, t1 / tN weak."
        parts += ["### Speed-up and efficiency", text, markdown_table(head, rows_)]
    if compared := comparisons(found):
        rows_ = [
            [one.other.cell.method, *_where(one.lift.cell)[1:], f"{one.faster:.2f}", _number(one.predicted_faster, 2),
             _number(one.fewer_bytes, 1)]
            for one in compared
        ]  # fmt: skip
        head = ["against", *_WHERE[1:], "LIFT's step is times as fast", "predicted", "times fewer bytes"]
        parts += ["### LIFT against the others", markdown_table(head, rows_)]
    if any(one.median["refresh_seconds"] is not None for one in found):
        rows_ = [
            [*_where(one.cell)[1:], _number(seconds, 3), _number(one.median["predicted_refresh_seconds"], 3),
             _number(seconds / one.seconds, 1), _megabytes(one, "refresh_wire_bytes")]
            for one in found if (seconds := one.median["refresh_seconds"]) is not None
        ]  # fmt: skip
        head = [*_WHERE[1:], "refresh, s", "predicted, s", "in steps", "MB it adds"]
        parts += ["### Refresh", markdown_table(head, rows_)]
    return parts


def _calibration(sizes: Sizes, rows: Sequence[Row]) -> str:
    found = calibrate(rows, sizes)
    if found is None:
        return "No time is predicted: full fine-tuning was not measured on one rank."
    lines = [
        "Calibrated, by runs on one rank: products at "
        f"{1e3 * found.tflops:.1f} GFLOP/s (full fine-tuning's forward and backward), memory at "
        f"{found.bandwidth_gb:.1f} GB/s (its optimizer phase)"
        + (f", a refresh at {1e3 * found.refresh_tflops:.1f} GFLOP/s (LIFT's)" if found.refresh_tflops else "")
        + "."
    ]
    given = dict.fromkeys((row["link"], row["link_gbit"]) for row in rows if row["link_gbit"])
    lines += [f"Link {name}: {gbit:g} Gbit/s, as given." for name, gbit in given]
    for (nodes, ranks, link), rate in found.links.items():
        where = "on one node" if nodes == 1 else f"on {nodes} nodes, link {link}"
        lines.append(f"All-reduce of {ranks} ranks {where}: {8 * rate:.2f} Gbit/s, measured.")
    lines.append(
        "Predicted: every other figure so called, by `lift_ds.planner`"
        + (", without overlap of collectives and computation" if found.cores else "")
        + ". Full fine-tuning on one rank is what was calibrated by."
    )
    return "\n".join(f"- {line}" for line in lines)


def _measured(found: Sequence[Summary]) -> str:
    rows = [
        [
            *_where(one.cell), str(one.repetitions), f"{one.seconds:.3f} ({one.fastest:.3f} to {one.slowest:.3f})",
            _number(one.predicted, 3), _number(one.predicted and one.seconds / one.predicted, 2),
            _number(1e-6 * one.wire if one.cell.ranks > 1 else None, 2),
            _megabytes(one, "predicted_wire_bytes") if one.cell.ranks > 1 else "-", _number(one.limit, 3),
            _number(one.limit and one.seconds / one.limit, 2), _megabytes(one, "peak_bytes"),
            _megabytes(one, "predicted_peak_bytes"),
        ]
        for one in found
    ]  # fmt: skip
    head = [
        *_WHERE, "runs", "step, s", "predicted, s", "measured/predicted", "MB", "predicted MB", "limit, s",
        "step/limit", "peak MB", "predicted peak MB",
    ]  # fmt: skip
    return markdown_table(head, rows)


def _where(cell: Cell) -> list[str]:
    return [
        cell.method, str(cell.stage), cell.scaling, str(cell.nodes), str(cell.ranks), cell.link, str(cell.tokens)
    ]  # fmt: skip


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _megabytes(one: Summary, column: str) -> str:
    value = one.median[column]
    return _number(None if value is None else 1e-6 * value, 2)
