"""The report of a comparison in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.measure.tables import FAILED, OK, Row, markdown_table
from benchmarks.methods.cells import COUNT, TUNE, cell_of, cells_of, choose, left_to_do
from benchmarks.methods.studies import EXACT_MATCH, TARGET_LOSS, Study, Task
from benchmarks.methods.summary import (
    CONFIDENCE,
    MEASURES,
    SHARES,
    Estimate,
    Result,
    base_row,
    difference,
    results,
    unequal_starts,
)

#: Methods that all others are set against.
REFERENCES = ("full", "lora", "lift")

_EDGES = {
    "lowest": "the lowest rate tried",
    "highest": "the highest rate tried",
    "only": "the only rate tried",
}


def write_report(path: Path, study: Study, rows: Sequence[Row], pictures: Sequence[str]) -> None:
    """Write the report.

    Args:
        path: of the file.
        study: what is compared.
        rows: of the study.
        pictures: names of the plots beside it.
    """
    parts = [f"# Comparison of methods: {study.name}", _surroundings(rows), *_warnings(study, rows)]
    parts += [f"![{name.removesuffix('.svg')}]({name})" for name in pictures]
    found = results(study, rows)
    for task in study.tasks:
        parts += [f"## {task.name}", _about(study, task)]
        parts += _compared(task, [one for one in found if one.task == task], rows)
        parts += ["### Learning rates", _TUNING[task.decides], _tuning(study, task, rows)]
    path.write_text("\n\n".join(parts) + "\n")


def _surroundings(rows: Sequence[Row]) -> str:
    lines = []
    for title, names in {
        "Processor": ("cpu", "cores"), "Device": ("device",), "torch": ("torch",), "transformers": ("transformers",),
        "PEFT": ("peft",), "lm_eval": ("lm_eval",), "Python": ("python",), "Commit of lift_ds": ("commit",),
    }.items():  # fmt: skip
        values = [", ".join(str(row[name]) for name in names) for row in rows if row[names[0]] is not None]
        if values:
            lines.append(f"- {title}: {'; '.join(dict.fromkeys(values))}" + (" cores" if "cores" in names else ""))
    dates = sorted(row["date"] for row in rows)
    if dates:
        lines.append(f"- Date: {dates[0]} to {dates[-1]}")
    return "\n".join(lines)


def _warnings(study: Study, rows: Sequence[Row]) -> list[str]:
    """What keeps the comparison from being whole or fair."""
    lines = []
    for task in study.tasks:
        for method in study.methods:
            choice = choose(study, task, method, rows)
            if choice is not None and choice.edge:
                lines.append(
                    f"{task.name}, {method.name}: the best learning rate, {choice.rate:g}, is {_EDGES[choice.edge]}."
                )
            if choice is None:
                lines.append(f"{task.name}, {method.name}: no learning rate is chosen yet.")
    left = left_to_do(cells_of(study, rows), rows)
    if left:
        lines.append(f"Runs that have not been made yet: {len(left)}.")
    lines += unequal_starts(rows)
    lines += [f"{cell_of(row).name} failed: {row['error']}" for row in rows if row["status"] == FAILED]
    return ["## What is missing", "\n".join(f"- {line}" for line in lines)] if lines else []


def _about(study: Study, task: Task) -> str:
    test = f"{task.test_rows} rows of {task.test_file}" if task.test_file else f"{task.test_rows} rows held out"
    return (
        f"Source: {task.source}. Trained on {task.train_rows} rows, {task.steps} steps of {task.batch} rows. Learning "
        f"rates: chosen on {task.validation_rows} other rows, with seed {study.tuning_seed}. Compared on {test}, with "
        f"seeds {', '.join(map(str, study.counted_seeds))}, which chose nothing."
    )


def _compared(task: Task, found: Sequence[Result], rows: Sequence[Row]) -> list[str]:
    if not found:
        return ["No counted run has been made yet."]
    measured = [name for name in MEASURES if any(one.of(name) for one in found)]
    titles = [MEASURES[name] for name in measured]
    parts = [
        "### Test",
        f"Mean over the seeds ± half of its {CONFIDENCE:.0%} interval (Student's t). General loss: on Python's "
        "language reference. KL: of the base's distributions from the tuned model's, on questions of other tasks.",
        markdown_table(["method", "learning rate", "seeds", *titles], _means(task, found, rows, measured)),
    ]
    for reference in REFERENCES:
        against = next((one for one in found if one.method.name == reference), None)
        others = [one for one in found if one is not against]
        if against is None or not others:
            continue
        table = [
            [one.method.name, *(_shown(difference(one, against, name), name, signed=True) for name in measured)]
            for one in others
        ]
        parts += [f"### Differences to {reference}", _PAIRED, markdown_table(["method", *titles], table)]
    return [*parts, "### Cost", _COST, _costs(found)]


_PAIRED = "Means of the differences, paired by seed, ± half of their interval. One without 0 inside is in bold."


def _means(task: Task, found: Sequence[Result], rows: Sequence[Row], measured: Sequence[str]) -> list[list[str]]:
    lines = []
    base = base_row(rows, task.name, COUNT)
    if base is not None:
        values = [None if base[name] is None else Estimate(base[name], None, 1) for name in measured]
        lines.append(["base", "-", "-", *(_shown(one, name) for one, name in zip(values, measured, strict=True))])
    for one in found:
        rate = f"{one.choice.rate:g}" + (f" ({one.choice.edge})" if one.choice.edge else "")
        means = (_shown(one.of(name), name) for name in measured)
        lines.append([one.method.name, rate, str(len(one.by_seed)), *means])
    return lines


def _shown(found: Estimate | None, column: str, *, signed: bool = False) -> str:
    if found is None:
        return "-"
    factor, digits = (100, 1) if column in SHARES else (1, 4)
    text = f"{factor * found.mean:{'+' if signed else ''}.{digits}f}"
    if found.half is None:
        return text
    text += f" ± {factor * found.half:.{digits}f}"
    return f"**{text}**" if signed and abs(found.mean) > found.half else text


_COST = (
    "Medians over the counted runs. Peak: of the training process on the host, with its libraries, and of the device's "
    "memory where there is one."
)


def _costs(found: Sequence[Result]) -> str:
    def median(one: Result, column: str, shown: Callable[[float], str]) -> str:
        values = [row[column] for row in one.by_seed.values() if row[column] is not None]
        return shown(statistics.median(values)) if values else "-"

    def megabytes(value: float) -> str:
        return f"{1e-6 * value:,.0f}"

    head = ["method", "trained entries", "steps", "tokens", "training, s", "peak, MB", "peak of the device, MB"]
    table = [
        [
            one.method.name, median(one, "trained_entries", "{:,.0f}".format), median(one, "steps", "{:.0f}".format),
            median(one, "tokens", "{:,.0f}".format), median(one, "training_seconds", "{:.1f}".format),
            median(one, "training_peak_bytes", megabytes), median(one, "training_peak_device_bytes", megabytes),
        ]
        for one in found
    ]  # fmt: skip
    return markdown_table(head, table)


_TUNING = {
    EXACT_MATCH: "On the validation rows: exact match in %, and in brackets the loss. In bold: the chosen rate.",
    TARGET_LOSS: "The loss on the outputs of the validation rows. In bold: the chosen rate.",
}


def _tuning(study: Study, task: Task, rows: Sequence[Row]) -> str:
    tuned = [row for row in rows if (row["phase"], row["task"], row["seed"]) == (TUNE, task.name, study.tuning_seed)]
    rates = sorted({row["learning_rate"] for row in tuned})
    by_cell = {(row["method"], row["learning_rate"]): row for row in tuned}
    table = []
    for method in study.methods:
        choice = choose(study, task, method, rows)
        cells = []
        for rate in rates:
            row = by_cell.get((method.name, rate))
            text = "" if row is None else _tried(task, row)
            cells.append(f"**{text}**" if choice is not None and choice.rate == rate else text)
        table.append([method.name, *cells])
    return markdown_table(["method", *(f"{rate:g}" for rate in rates)], table)


def _tried(task: Task, row: Row) -> str:
    if row["status"] != OK:
        return "failed"
    if task.decides == TARGET_LOSS:
        return f"{row['target_loss']:.3f}"
    return f"{100 * row['exact_match']:.1f} ({row['target_loss']:.3f})"
