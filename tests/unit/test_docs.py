"""Pins that output, tables and pictures in the documentation are what the program makes of them, and that the files,
tests and public names that pages name are there.

`python tests/documented.py` writes output and tables, `python -m benchmarks.pictures` the pictures.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from documented import pages, refreshed
from pages import PAGES, REPOSITORY

import lift_ds
from benchmarks import pictures

#: A file in the repository, perhaps with a test in it, between backticks.
_NAMED = re.compile(
    r"`(?P<path>(?:benchmarks|docs|ds_configs|launch|lift_ds|tests)/[\w./-]*\w/?)(?:::(?P<test>test_\w+))?`"
)
_LINK = re.compile(r"\]\((?P<path>[^):#]+)(?:#[^)]*)?\)")


def test_there_is_output_to_check() -> None:
    assert {"planning.md", "settings.md", "deepspeed_options.md"} <= {page.name for page in pages()}


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_output_is_what_the_command_prints(page: Path) -> None:
    assert refreshed(page.read_text()) == page.read_text()


def test_pictures_are_what_the_script_draws(tmp_path: Path) -> None:
    pictures.main(["--output", str(tmp_path)])
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert drawn == {path.name: path.read_text() for path in (REPOSITORY / "docs/pictures").iterdir()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_files_and_tests_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    missing = [found["path"] for found in _LINK.finditer(text) if not (page.parent / found["path"]).exists()]
    for found in _NAMED.finditer(text):
        path = REPOSITORY / found["path"]
        if not path.exists() or (found["test"] and f"def {found['test']}(" not in path.read_text()):
            missing.append(found[0])
    assert not missing


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    shown = re.findall(r"^::: lift_ds\.(\w+)$", (REPOSITORY / "docs/api.md").read_text(), re.MULTILINE)
    assert sorted(shown) == sorted(lift_ds.__all__)
