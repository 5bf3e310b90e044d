"""Tables of studies: a CSV that is added to run by run, rewritten whole and at once; tables in Markdown; the folder
they lie in, for one study at a time.
"""

from __future__ import annotations

import csv
import fcntl
import io
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lift_ds.runtime.files import write_whole

#: A row: column -> value; None where nothing was measured, counted or predicted.
Row = dict[str, Any]

#: Column -> kind of its values, in the order of the file.
Columns = Mapping[str, type]

#: Seconds that the processes of a study that was killed may take to end.
_ENDING = 5.0

#: Values of the column "status".
OK, FAILED = "ok", "failed"


def read_rows(path: Path, columns: Columns) -> list[Row]:
    """Read the rows of a study; none where the file does not exist.

    Raises:
        ValueError: when it is not the file of such a study, or a value cannot be read.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if list(reader.fieldnames or ()) != list(columns):
            raise ValueError(f"{path}: its columns are not those of a study; name another folder by --output")
        return [_read(path, reader.line_num, texts, columns) for texts in reader]


def _read(path: Path, line: int, texts: dict[str, str], columns: Columns) -> Row:
    row: Row = {}
    for name, kind in columns.items():
        try:
            row[name] = kind(texts[name]) if texts[name] else None
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {line}: {name}={texts[name]!r} is no {kind.__name__}") from error
    return row


def write_rows(path: Path, columns: Columns, rows: Iterable[Row]) -> None:
    """Write all rows; a reader sees either the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        # A number is written as it reads, so that a table that is read and written stays the same.
        writer.writerow({name: kind(row[name]) for name, kind in columns.items() if row[name] is not None})
    write_whole(path, text.getvalue())


def markdown_table(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other studies out of a folder.

    Raises:
        ValueError: when one is at work there.
    """
    held = os.open(folder, os.O_RDONLY)
    try:
        _lock(held, folder)
        yield
    finally:
        os.close(held)


def _lock(held: int, folder: Path) -> None:
    """Lock a folder, which processes forked from a study that was killed hold until they have ended too."""
    deadline = time.monotonic() + _ENDING
    while True:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise ValueError(f"--output {folder}: another study is at work there") from None
        time.sleep(0.05)
