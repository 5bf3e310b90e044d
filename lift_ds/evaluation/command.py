"""The command `lift-ds evaluate`: its flags, and what it prints and writes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lift_ds.evaluation.measure import check_writable, evaluate
from lift_ds.evaluation.models import names_delta
from lift_ds.evaluation.request import DTYPES, EvaluationRequest
from lift_ds.runtime.files import write_whole


def main(arguments: list[str]) -> int:
    """Run the command.

    Args:
        arguments: what follows `lift-ds evaluate`.

    Returns:
        The exit code: 0, 2 for what cannot be used.
    """
    try:
        request, output = read(arguments)
        result = evaluate(request)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(result))
    if output is not None:
        write_whole(output, json.dumps(result, indent=1, ensure_ascii=False, default=str) + "\n")
        print(f"written to {output}")
    return 0


def read(arguments: list[str]) -> tuple[EvaluationRequest, str | None]:
    """Read the command line.

    Args:
        arguments: what follows `lift-ds evaluate`.

    Returns:
        What to evaluate, and the file for the result.

    Raises:
        ValueError: an argument cannot be used.
    """
    given = vars(make_parser().parse_args(arguments))
    output = given.pop("output")
    given["tasks"] = [name.strip() for part in given["tasks"] for name in part.split(",") if name.strip()]
    if given["kl_on"] and given["base"] is None:
        raise ValueError("--kl_on compares with the model before training: name it by --base")
    if given["base"] is not None and not given["kl_on"] and not names_delta(given["model"]):
        raise ValueError(f"--base {given['base']} is for --kl_on, which names no file, and for deltas")
    for flag, path in (("--output", output), ("--samples", given["samples"])):
        if path is not None:
            check_writable(path, flag)
    settings: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items()
    }
    return EvaluationRequest(**settings), output


def make_parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    default = {field.name: field.default for field in dataclasses.fields(EvaluationRequest)}
    parser = argparse.ArgumentParser(
        prog="lift-ds evaluate",
        description="Measures what a model can do (tasks), and what it has kept (loss, KL divergence from its base).",
        allow_abbrev=False,
    )
    folder = "a saved model, a PEFT adapter or a checkpoint"
    parser.add_argument("model", metavar="MODEL", help=f"a name on the Hub, a folder: {folder}, or a delta")
    what = parser.add_argument_group("what to measure")
    what.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="tasks and groups, with commas or spaces")
    what.add_argument("--data", metavar="DIR", help="folder of test files for --tasks; nothing is downloaded")
    what.add_argument("--rows", action="append", default=[], metavar="FILE", help="instruction rows with an `answer`")
    what.add_argument("--loss_on", nargs="+", default=[], metavar="FILE", help="next-token loss: rows, or a .txt")
    what.add_argument("--kl_on", nargs="+", default=[], metavar="FILE", help="KL from --base: rows, or a .txt")
    what.add_argument(
        "--base", metavar="MODEL", help="the model before training, for --kl_on; a delta is applied to it"
    )
    how = parser.add_argument_group("how")
    how.add_argument("--limit", type=int, metavar="N", help="most rows of each task and file (default: all)")
    how.add_argument("--max_new_tokens", type=int, metavar="N", help="of a generated text (default: the task's)")
    how.add_argument("--device", help="such as cuda:1 (default: the accelerator, else the CPU)")
    for name, text in (
        ("batch_size", "sequences of a forward"),
        ("window", "most tokens of a row for --loss_on and --kl_on"),
        ("seed", "of the harness, which chooses worked examples by it"),
    ):
        how.add_argument(f"--{name}", type=int, metavar="N", default=default[name], help=f"{text} (%(default)s)")
    how.add_argument("--dtype", choices=DTYPES, default=default["dtype"], help="of the weights (auto: as stored)")
    output = parser.add_argument_group("output")
    output.add_argument("--output", metavar="FILE", help="write all figures and settings there, as JSON")
    output.add_argument("--samples", metavar="FILE", help="write each row's prompt, text and score, as JSON lines")
    return parser


def table(result: dict[str, Any]) -> str:
    """Return the figures as a table: metric, value, standard error, rows."""
    lines = [("metric", "value", "std. error", "rows")]
    for name, task in result["tasks"].items():
        for metric, figure in task["metrics"].items():
            lines.append((f"{name} {metric}", *_figures(figure), str(task["rows"] or "")))
    for kind, about in (("loss", "loss on {}, nats per token"), ("kl", "KL from the base on {}, nats per token")):
        for path, figure in result[kind].items():
            lines.append((about.format(Path(path).name), *_figures(figure), str(figure["rows"])))
    return "\n".join(_aligned(lines))


def _figures(figure: dict[str, Any]) -> tuple[str, str]:
    return f"{figure['value']:.4f}", "" if figure["stderr"] is None else f"{figure['stderr']:.4f}"


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width)
                  for column, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in lines
    ]  # fmt: skip
