"""What a folder holds, to the bit: sizes and checksums of its files, and JSON that is whole or not there.

For one process; `lift_ds.checkpoint` shares the work between ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lift_ds.config import read_json_object
from lift_ds.runtime.files import UNFINISHED, write_whole

#: Key of the checksum that a sealed JSON file carries of the rest of itself.
_SEAL = "sha256"


def files_in(folder: str | os.PathLike[str], leave_out: str) -> dict[str, int]:
    """List the files below a folder.

    Args:
        folder: any folder; an empty result where it does not exist.
        leave_out: a file name at its top that is not listed, nor are unfinished ones.

    Returns:
        Path relative to the folder, with forward slashes -> bytes; sorted.
    """
    top = Path(folder)
    paths = sorted(path for path in top.rglob("*") if path.is_file())
    names = {path.relative_to(top).as_posix(): path for path in paths}
    return {
        name: path.stat().st_size for name, path in names.items() if name != leave_out and not name.endswith(UNFINISHED)
    }


def checksum(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file, as `sha256sum` prints it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sealed(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write a JSON object with a checksum of itself, whole or not at all.

    Args:
        path: of the file.
        content: plain JSON values; a seal among them is replaced.
    """
    write_whole(path, json.dumps({**content, _SEAL: _seal_of(content)}, indent=1) + "\n")


def read_sealed(path: str | os.PathLike[str], version: int) -> dict[str, Any]:
    """Read what `write_sealed` wrote.

    Args:
        path: of the file.
        version: what its "format" must be.

    Returns:
        The content, without its seal.

    Raises:
        ValueError: it is no JSON object, one of another format, or was changed after it was written.
    """
    name = os.fspath(path)
    try:
        content = read_json_object(name)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not text: {error.reason} at byte {error.start}") from error
    if "format" not in content:
        raise ValueError(f"{name}: not a description of a LIFT checkpoint")
    if content["format"] != version:
        raise ValueError(f"{name}: format {content['format']!r}, this version reads {version}")
    if content.pop(_SEAL, None) != _seal_of(content):
        raise ValueError(f"{name}: was changed after it was written, its checksum does not fit")
    return content


def _seal_of(content: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != _SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
