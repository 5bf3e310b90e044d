"""Pins that output and tables in the documentation are what the program makes of them; `python tests/documented.py`
writes them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from documented import pages, refreshed


def test_there_is_output_to_check() -> None:
    assert {"planning.md", "settings.md", "deepspeed_options.md"} <= {page.name for page in pages()}


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_output_is_what_the_command_prints(page: Path) -> None:
    assert refreshed(page.read_text()) == page.read_text()
