"""The commands `lift-ds export`, `lift-ds apply` and `lift-ds inspect`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from lift_ds.delta.adapters import ADAPTERS, export_adapter
from lift_ds.delta.apply import apply_deltas
from lift_ds.delta.export import export_delta
from lift_ds.delta.file import DeltaFile
from lift_ds.delta.meeting import ON_CONFLICT
from lift_ds.delta.summary import headline, inspect_delta, summary_of, table

_LIFT = "lift"


def export(arguments: list[str]) -> int:
    """Run `lift-ds export`.

    Args:
        arguments: what follows it.

    Returns:
        The exit code: 0, 2 for what cannot be used.
    """
    return _run(_export, make_export_parser().parse_args(arguments))


def apply(arguments: list[str]) -> int:
    """Run `lift-ds apply`; as `export`."""
    return _run(_apply, make_apply_parser().parse_args(arguments))


def inspect(arguments: list[str]) -> int:
    """Run `lift-ds inspect`; as `export`."""
    return _run(_inspect, make_inspect_parser().parse_args(arguments))


def make_export_parser() -> argparse.ArgumentParser:
    """Return what reads the command line of `lift-ds export`."""
    parser = _parser("export", "Writes what training changed in a model as a file.")
    parser.add_argument("base", metavar="BASE", help="the model before training: a folder, or a name on the Hub")
    parser.add_argument("tuned", metavar="TUNED", help="the model after it")
    parser.add_argument("--output", metavar="FILE", required=True, help="the delta; of the formats of PEFT a folder")
    parser.add_argument(
        "--format",
        choices=(_LIFT, *ADAPTERS),
        default=_LIFT,
        help="lift: a file that gives the tuned model back to the bit, and that lift_ds.delta.read_patches reads as "
        "patches for vLLM; shira, supertuning: an adapter for PEFT (%(default)s)",
    )
    return parser


def make_apply_parser() -> argparse.ArgumentParser:
    """Return what reads the command line of `lift-ds apply`."""
    parser = _parser("apply", "Writes the tuned model: a base with deltas applied.")
    parser.add_argument("base", metavar="BASE", help="the model the deltas are of: a folder, or a name on the Hub")
    parser.add_argument("files", metavar="FILE", nargs="+", help="deltas, as lift-ds export writes them")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder of the tuned model")
    parser.add_argument(
        "--on-conflict",
        choices=ON_CONFLICT,
        default=ON_CONFLICT[0],
        help="where deltas give an entry different values: refuse, take the last one's, take their mean (%(default)s)",
    )
    return parser


def make_inspect_parser() -> argparse.ArgumentParser:
    """Return what reads the command line of `lift-ds inspect`."""
    parser = _parser("inspect", "Checks a delta, and says what it changes.")
    parser.add_argument("file", metavar="FILE", help="a delta, as lift-ds export writes it")
    return parser


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"lift-ds {name}", description=description, allow_abbrev=False)


def _run(action: Callable[[argparse.Namespace], None], given: argparse.Namespace) -> int:
    try:
        action(given)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _export(given: argparse.Namespace) -> None:
    if given.format != _LIFT:
        export_adapter(given.base, given.tuned, given.output, given.format)
        print(f"written to {given.output}: an adapter for PEFT")
        return
    file = export_delta(given.base, given.tuned, given.output)
    print(f"written to {file}: {headline(summary_of(DeltaFile(file)))}")


def _apply(given: argparse.Namespace) -> None:
    apply_deltas(given.base, given.files, given.output, given.on_conflict)
    print(f"written to {Path(given.output)}")


def _inspect(given: argparse.Namespace) -> None:
    print(table(inspect_delta(given.file)))
