"""Pins that output shown in the documentation is what the commands print; `python tests/documented.py` writes it."""

from __future__ import annotations

from pathlib import Path

import pytest
from documented import DOCS, pages, refreshed


def test_there_is_output_to_check() -> None:
    assert DOCS / "planning.md" in pages()


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_output_is_what_the_command_prints(page: Path) -> None:
    assert refreshed(page.read_text()) == page.read_text()
