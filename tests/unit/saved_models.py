"""Small saved models for the tests of deltas: written, changed, read and compared by their bits; and commands that end
with an error.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from cases import small_llama
from helpers import same_bits
from safetensors.torch import load_file, save_file
from torch import Tensor

from lift_ds import cli

#: Name of each weights' file -> its tensors.
Files = dict[str, dict[str, Tensor]]

#: A matrix that LIFT manages, and a tensor that it does not.
Q = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"


def contents(folder: Path) -> Files:
    """Name of each weights' file -> its tensors."""
    return {path.name: load_file(path) for path in sorted(folder.glob("model*.safetensors"))}


def state(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in contents(folder).values() for name, tensor in file.items()}


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of each of a model's files."""
    for name, file in contents(folder).items():
        change(file)
        save_file(file, folder / name, {"format": "pt"})


def perturb(file: dict[str, Tensor], share: float = 0.05, seed: int = 0) -> None:
    """Give a share of each matrix new values."""
    drawn = torch.Generator().manual_seed(seed)
    for tensor in (tensor for tensor in file.values() if tensor.dim() == 2):
        flat = tensor.view(-1)
        chosen = torch.randperm(len(flat), generator=drawn)[: round(share * len(flat))]
        flat[chosen] = torch.randn(len(chosen), generator=drawn).to(tensor.dtype)


def model_in(folder: Path, dtype: torch.dtype = torch.float32, shard_size: str = "5GB") -> Path:
    small_llama(dtype).save_pretrained(folder, max_shard_size=shard_size)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("the card of the base")
    return folder


def same_files(a: Files, b: Files) -> bool:
    return a.keys() == b.keys() and all(
        a[file].keys() == b[file].keys() and all(same_bits(a[file][name], b[file][name]) for name in a[file])
        for file in a
    )


def refused(*arguments: object) -> str:
    """Run a command that ends with code 2; what it says, in one line."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert cli.main(list(map(str, arguments))) == 2
    assert said.getvalue().startswith("error: ")
    assert said.getvalue().count("\n") == 1, said.getvalue()
    return said.getvalue()


def altered(folder: Path, to: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    rewrite(Path(shutil.copytree(folder, to)), change)
    return to
