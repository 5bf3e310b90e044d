"""How the plots of benchmarks are saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def save_svg(figure: Any, path: Path) -> None:
    """Save a figure of matplotlib; the same figure gives the same file."""
    import matplotlib  # here: the numbers do not need it

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "lift_ds"}):
        figure.savefig(path, metadata={"Date": None})
    # matplotlib ends lines of paths with a blank
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
    print(f"drawn to {path}")
