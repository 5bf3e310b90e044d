"""The pages of the documentation, and the blocks of code in them."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]

PAGES = (REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md")))

_BLOCK = re.compile(
    r"^(?:<!-- test: (?P<name>\w+) -->\n)?(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^ *```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `<!-- test: NAME -->` in the line above names it for a test."""

    page: str  # its path in the repository
    line: int
    language: str
    name: str | None
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.name or self.line}"


def blocks(language: str) -> list[Block]:
    """Return the fenced blocks of a language."""
    return [block for page in PAGES for block in _blocks_of(page) if block.language == language]


def _blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(
            page=str(page.relative_to(REPOSITORY)),
            line=text.count("\n", 0, found.start()) + 1,
            language=found["language"],
            name=found["name"],
            text=textwrap.dedent(found["text"]),
        )
        for found in _BLOCK.finditer(text)
    ]
