"""The device that the command line names, for what has to be known before DeepSpeed and torch are imported."""

from __future__ import annotations

import argparse


def device_named(arguments: list[str] | None = None) -> str:
    """Return what --device says, "cpu" by default; other arguments are left to the benchmark's own parser."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", default="cpu")
    return parser.parse_known_args(arguments)[0].device
