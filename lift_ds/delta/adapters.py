"""A delta as an adapter of PEFT: SHiRA or Super-Tuning, which add differences to some entries of linear layers.

Both fix how many entries a layer has: SHiRA r (m + n) of an m x n matrix with one r, Super-Tuning one share of each
matrix. The smallest r or share is taken that every matrix fits in. Entries that are left over are at positions that did
not change, with a difference of zero.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lift_ds.delta.export import check_new_folder, export_delta, progress
from lift_ds.delta.file import DENSE, SAME, SPARSE, Change, DeltaFile
from lift_ds.delta.layout import Spool, header_of
from lift_ds.delta.model_files import ModelFiles
from lift_ds.delta.tensors import INT32_ENTRIES, bits_of
from lift_ds.runtime.files import whole_folder

_WEIGHT = ".weight"
_FLOATS = ("F32", "F16", "BF16")  # whose differences float32 can hold

#: Parts of names of matrices that are no linear layers: embeddings, and experts, which transformers holds as stacks.
_NOT_LINEAR = ("embed", "wte", "wpe", "experts")


@dataclass(frozen=True)
class AdapterFormat:
    """How PEFT holds one kind of sparse adapter."""

    peft_type: str
    values: str  # name of the differences, behind that of the layer
    indices: str  # name of the positions
    flat: bool  # positions are flat [entries], otherwise rows and columns [2, entries]
    size: Callable[[Mapping[str, Change]], tuple[dict[str, Any], dict[str, int]]]


def _size_shira(changes: Mapping[str, Change]) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the settings that make room for all, and the entries of each matrix by them."""
    r = max(math.ceil(change.changed / sum(change.shape)) for change in changes.values())
    sizes = {name: r * sum(change.shape) for name, change in changes.items()}
    for name, change in changes.items():
        if sizes[name] > math.prod(change.shape):
            raise ValueError(
                f"SHiRA has one r for all matrices, {r} for the one that changed most, and {name} "
                f"{[*change.shape]} has no r (m + n) entries; use --format lift or supertuning"
            )
    return {"r": r, "mask_type": "random", "random_seed": 0}, sizes


def _size_supertuning(changes: Mapping[str, Change]) -> tuple[dict[str, Any], dict[str, int]]:
    def entries(change: Change) -> int:
        return int(math.prod(change.shape) * (1 - sparsity))  # as PEFT computes it, in the same floating point

    sparsity = 1 - max(change.changed / math.prod(change.shape) for change in changes.values())
    while any(entries(change) < change.changed for change in changes.values()):
        sparsity = math.nextafter(sparsity, 0)
    return {"sparsity": sparsity}, {name: entries(change) for name, change in changes.items()}


ADAPTERS = {
    "shira": AdapterFormat("SHIRA", "shira_weight", "shira_indices", False, _size_shira),
    "supertuning": AdapterFormat("SUPERTUNING", "supertuning_values", "supertuning_indices", True, _size_supertuning),
}


def export_adapter(base: str, tuned: str, output: str | Path, kind: str) -> Path:
    """Write what training changed in a model as an adapter that PEFT loads.

    Args:
        base: folder or Hub name of the model before training.
        tuned: of the model after it.
        output: folder of the adapter; it must not be there, or be empty.
        kind: a key of ADAPTERS.

    Returns:
        The folder.

    Raises:
        ValueError: as for `export_delta`; or a tensor changed that is no matrix of a linear layer, which is named.
        OSError: the adapter cannot be written.
    """
    output = Path(output)
    check_new_folder(output)
    # A delta first: only when all is compared is it known how many entries each matrix must have.
    beside = tempfile.TemporaryDirectory(dir=output.absolute().parent, suffix=".tmp")
    with whole_folder(output) as unfinished, beside as folder:
        delta = DeltaFile(export_delta(base, tuned, Path(folder) / "delta.safetensors"))
        _write_adapter(delta, ModelFiles(base), ADAPTERS[kind], unfinished)
    return output


def _write_adapter(delta: DeltaFile, base: ModelFiles, how: AdapterFormat, folder: Path) -> None:
    changes = {name: change for name, change in delta.changes.items() if change.kind != SAME}
    if not changes:
        raise ValueError("nothing changed, so that there is nothing for an adapter to hold")
    for name, change in changes.items():
        _check_linear(name, change)
    settings, sizes = how.size(changes)
    with Spool(folder) as spool, progress(len(changes), "writing") as shown:
        for name, change in changes.items():
            positions, differences = _differences(base.read(name), *delta.read(name), sizes[name])
            if not how.flat:
                positions = torch.stack([positions // change.shape[1], positions % change.shape[1]])
            layer = "base_model.model." + name.removesuffix(_WEIGHT)
            spool.add(f"{layer}.{how.indices}", "I32", positions.shape, [positions.int()])
            spool.add(f"{layer}.{how.values}", "F32", differences.shape, [differences])
            shown.update()
        spool.write(folder / "adapter_model.safetensors", header_of(spool.tensors(), {"format": "pt"}))
    config = {
        "peft_type": how.peft_type,
        "task_type": _task_of(base.folder),
        "base_model_name_or_path": delta.base,
        "inference_mode": True,
        "target_modules": [name.removesuffix(_WEIGHT) for name in changes],
        **settings,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _check_linear(name: str, change: Change) -> None:
    """Refuse what PEFT's sparse adapters cannot hold, as far as names and shapes tell."""
    reason = None
    if change.kind not in (SPARSE, DENSE) or change.base is None:
        reason = "is in one of the models alone"
    elif len(change.shape) != 2 or not name.endswith(_WEIGHT):
        reason = f"of shape {[*change.shape]} changed, and is no matrix of a linear layer"
    elif any(part in name for part in _NOT_LINEAR):
        reason = "changed, and is an embedding or an expert's matrix"
    elif change.dtype not in _FLOATS:
        reason = f"changed, and is {change.dtype}"
    elif math.prod(change.shape) > INT32_ENTRIES:
        reason = "changed, and has more entries than int32 can count"
    if reason is not None:
        raise ValueError(f"{name} {reason}; PEFT's sparse adapters hold linear layers alone, --format lift holds all")


def _differences(base: Tensor, indices: Tensor | None, values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return `size` flat positions, and what is to be added there, float32."""
    before = base.reshape(-1)
    if indices is None:
        indices = (bits_of(before) != bits_of(values)).nonzero().reshape(-1)
        values = values[indices]
    positions = indices.long()
    differences = (values.double() - before[positions].double()).float()
    # Of the first `size` positions at least as many are free as there are entries left over.
    free = torch.ones(size, dtype=torch.bool)
    free[positions[positions < size]] = False
    spare = free.nonzero().reshape(-1)[: size - len(positions)]
    return torch.cat([positions, spare]), torch.cat([differences, differences.new_zeros(len(spare))])


def _task_of(folder: Path) -> str | None:
    config = folder / "config.json"
    architectures = json.loads(config.read_text(encoding="utf-8")).get("architectures") if config.is_file() else None
    return "CAUSAL_LM" if architectures and architectures[0].endswith("ForCausalLM") else None
