"""Commands whose output the documentation shows; `python tests/documented.py` writes what they print now."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

from lift_ds import cli

DOCS = Path(__file__).parents[1] / "docs"

#: An indented `$ lift-ds ...` and the indented lines below it.
_SHOWN = re.compile(r"^    \$ lift-ds (?P<command>.*)\n(?:(?:    .*|)\n)*?(?=\S|\Z)", re.MULTILINE)


def refreshed(text: str) -> str:
    """Return a page with the output of each of its `lift-ds` commands as it is now."""
    return _SHOWN.sub(lambda shown: f"    $ lift-ds {shown['command']}\n{_output(shown['command'])}\n", text)


def _output(command: str) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = cli.main(shlex.split(command))
    assert code == 0, command
    return "".join(f"    {line}".rstrip() + "\n" for line in said.getvalue().splitlines())


def pages() -> list[Path]:
    """Return the pages that show such output."""
    return [page for page in sorted(DOCS.rglob("*.md")) if _SHOWN.search(page.read_text())]


if __name__ == "__main__":
    for page in pages():
        page.write_text(refreshed(page.read_text()))
