"""Checkpoints of a run whose weights or states ZeRO-3 keeps on a disk: what DeepSpeed's own checkpoints leave out.

frozen weights and indices    DeepSpeed saves and loads the memory of a shard, which on a disk has none
counts of steps, settings     DeepSpeed copies the files of offloaded states and skips what is not in them
an earlier save               DeepSpeed does not copy those files over others, which a save that was stopped has left
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.ds_to_universal import dp_index_to_str
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from torch import Tensor

from lift_ds.model.partition import is_partitioned
from lift_ds.refresh.carry import EXP_AVG, MOMENTS
from lift_ds.runtime.ranks import by_main
from lift_ds.zero.partitioned import lives_on_nvme, shard_in_memory

#: Names of DeepSpeed's files of offloaded states: of a sub-group from one parameter's number to another's.
_STATE_FILE = re.compile(r"(?:exp_avg(?:_sq)?-)?(\d+_\d+)\.tensor\.swp")

#: DeepSpeed's folder, inside a checkpoint, of offloaded states.
_SAVED_STATES = "offloaded_tensors"


class FrozenShards:
    """Has the frozen shards of a rank in memory while a checkpoint is saved or loaded, 2/N bytes a parameter in bf16.

    Args:
        parameters: of the model.
    """

    def __init__(self, parameters: Iterable[Any]) -> None:
        self._on_disk = [p for p in parameters if not p.requires_grad and is_partitioned(p) and lives_on_nvme(p)]

    def fetch(self) -> None:
        """Read them from the disk."""
        for parameter in self._on_disk:
            with shard_in_memory(parameter, write=False) as shard:
                held = shard.detach().clone()
            parameter.ds_tensor.data = held
            parameter.ds_tensor.status = PartitionedParamStatus.AVAILABLE

    def put_back(self) -> None:
        """Write them to the disk, as they are now, and free the memory."""
        for parameter in self._on_disk:
            held = parameter.ds_tensor.data
            parameter.nvme_swapper.remove_partition_and_release_buffers([parameter])
            with shard_in_memory(parameter, write=True) as shard:
                shard.copy_(held)


def remove_leftovers(wrapper: Any) -> None:
    """Delete from this rank's folder what earlier runs have left; DeepSpeed copies the whole folder into a checkpoint.

    Args:
        wrapper: DeepSpeed's optimizer of stage 3; nothing happens where its states are not on a disk.
    """
    if not wrapper.swap_optimizer:
        return
    current = {str(master.ds_id) for master in wrapper.fp32_partitioned_groups_flat}
    for path in Path(wrapper.optimizer_swapper.swap_folder).glob("*.swp"):
        state_of = _STATE_FILE.fullmatch(path.name)
        if state_of and state_of[1] not in current:
            path.unlink()


def remove_saved_states(folder: Path | str) -> None:
    """Remove the offloaded states of all ranks from a folder that is about to be saved into; all ranks call.

    One all-gather, after which they are gone for every rank.

    Args:
        folder: of a tag, or of a Trainer's checkpoint with a tag inside; it may have no states, or not exist.

    Raises:
        ValueError: they cannot be removed.
    """

    def remove() -> None:
        for path in [*Path(folder).rglob(_SAVED_STATES)]:
            shutil.rmtree(path)

    by_main(remove)


@torch.no_grad()
def restore_states(wrapper: Any, folder: Path | str) -> None:
    """Bring back master values, moments, counts of steps and group settings, where states are offloaded to a disk.

    DeepSpeed copies the files it has saved, under names that another process may give to other states, and takes the
    moments for absent. Every rank reads its own files; no collective runs.

    Args:
        wrapper: DeepSpeed's optimizer of stage 3, into which DeepSpeed has loaded the checkpoint.
        folder: with `zero_pp_rank_*_optim_states.pt` and `offloaded_tensors/`.

    Raises:
        ValueError: files of this rank are missing.
    """
    rank = torch.distributed.get_rank()
    states_file = _only(Path(folder), f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    saved = torch.load(states_file, map_location="cpu", mmap=True, weights_only=False)["optimizer_state_dict"]
    masters, saved = saved["fp32_flat_groups"], saved["optimizer_state_dict"]
    inner = wrapper.optimizer
    for group, settings in zip(inner.param_groups, saved["param_groups"], strict=True):
        group.update({key: value for key, value in settings.items() if key != "params"})
    swapped = _swapped_files(wrapper, Path(folder) / _SAVED_STATES / f"rank{dp_index_to_str(rank)}")
    timers: set[str] = set()
    for number, master in enumerate(wrapper.fp32_partitioned_groups_flat):
        wrapper._prepare_sub_group(number, timers)
        state = dict(saved["state"].get(number, {}))
        if number in swapped:
            master.copy_(_read(swapped[number], "", master))
            state |= {key: _read(swapped[number], f"{key}-", master) for key in MOMENTS if state}
        else:
            master.copy_(masters[number])
        inner.state[master] = {key: _own_copy(value) for key, value in state.items()}
        wrapper._reassign_or_swap_out_partitioned_parameters(number)
        wrapper._release_sub_group(number, timers)
    wrapper._post_step(timers)


def _swapped_files(wrapper: Any, folder: Path) -> dict[int, Path]:
    """For each sub-group on a disk its saved file; both are named by parameters, whose numbers may have moved on."""
    masters = wrapper.fp32_partitioned_groups_flat
    here = [number for number in range(len(masters)) if wrapper._swappable_optimizer_subgroup(number)]
    here.sort(key=lambda number: _first_parameter(str(masters[number].ds_id)))
    files = sorted(
        (path for path in folder.glob("*.swp") if not path.name.startswith(EXP_AVG)),
        key=lambda path: _first_parameter(path.name),
    )
    if len(here) != len(files):
        raise ValueError(f"{folder}: {len(files)} offloaded states, this run has {len(here)}")
    return dict(zip(here, files, strict=True))


def _first_parameter(name: str) -> int:
    return int(name.split("_")[0])


def _read(master_file: Path, prefix: str, like: Tensor) -> Tensor:
    path = master_file.with_name(prefix + master_file.name)
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    return torch.from_file(str(path), shared=False, size=like.numel(), dtype=torch.float32)


def _own_copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        raise ValueError(f"{folder} has no {pattern}: not a checkpoint of this many ranks")
    return found[0]
