"""The safetensors files of a saved model, in a folder or from the Hub."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lift_ds.delta.layout import Entry, read_header, read_tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

#: What else belongs to a model: configuration, tokenizer, generation, code of its own, licence.
BESIDE = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")

#: Of these, what is about the weights' files.
_INDEX_FILES = "*.index.json"


@dataclass(frozen=True)
class Shard:
    """A file with tensors."""

    path: Path
    tensors: dict[str, Entry]  # in the order of their data
    texts: dict[str, str]


class ModelFiles:
    """The tensors of a model by their names in its files.

    Args:
        name: a folder, or a name on the Hub, whose files are taken from the cache or downloaded.

    Raises:
        ValueError: there is no such model, it has no safetensors files, or they are not whole.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.folder = _folder_of(name)
        self.shards = [_read_shard(path) for path in _weight_files(self.folder, name)]
        self._shard_of = {tensor: shard for shard in self.shards for tensor in shard.tensors}
        #: Name -> entry, in the order of the files and of their data.
        self.tensors = {name: entry for shard in self.shards for name, entry in shard.tensors.items()}
        twice = sum(len(shard.tensors) for shard in self.shards) - len(self.tensors)
        if twice:
            raise ValueError(f"{name}: {twice} tensors are in more than one of its files")

    def read(self, name: str) -> Tensor:
        """Read a tensor."""
        return read_tensor(self._shard_of[name].path, name)

    def beside(self) -> list[Path]:
        """Return the files that belong to the model and hold no weights."""
        found = {path for pattern in BESIDE for path in self.folder.glob(pattern) if path.is_file()}
        return sorted(found - set(self.folder.glob(_INDEX_FILES)))


def _folder_of(name: str) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{name} is a file; give a folder, or a name on the Hub")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"{name}: there is no such folder")
    return _from_hub(name)


def _from_hub(name: str) -> Path:
    """Return the folder of the cache that holds a model of the Hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["model*.safetensors", *BESIDE]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{name} is no folder, and cannot be had from the Hub: {reason}") from error


def _weight_files(folder: Path, name: str) -> list[Path]:
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise ValueError(f"{name} has neither {SINGLE} nor {INDEX}; save the model as safetensors first")
        return [folder / SINGLE]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is no index of safetensors files: {error!r}") from None
    for file in names:
        if not (folder / file).is_file():
            raise ValueError(f"{name}: {INDEX} names {file}, which is not there")
    return [folder / file for file in names]


def _read_shard(path: Path) -> Shard:
    tensors, texts, _ = read_header(path)
    return Shard(path, tensors, texts)
