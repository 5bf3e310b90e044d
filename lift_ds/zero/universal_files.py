"""Universal checkpoints: the states of a run in a form that loads on any number of ranks, in ZeRO stage 1, 2 or 3.

DeepSpeed (`deepspeed.checkpoint.ds_to_universal`, and its `"load_universal"`) knows trained parameters only, in one
of two forms that do not mix:

                                  DeepSpeed's converter                      here
    θ, fp32 master, moments       stages 1, 2: dicts; 3: bare flat tensors   dicts, which all stages read
    Adam's step                   per parameter in 1, 2; once in 3           both
    settings of a group           in 3 every group gets those of group 0     each its own
    frozen W and I, buffers       not loaded; 1, 2: also kept as float32     loaded, in the dtype they were saved in

The form written here is DeepSpeed's, read by DeepSpeed, plus the folder `frozen` that `restore` reads after it:

    TAG_universal/
      mp_rank_00_model_states.pt                  counters, schedule, client state (stages 1 and 2)
      zero_pp_rank_0_mp_rank_00_model_states.pt   the same (stage 3)
      zero/optimizer_state.pt                     settings of the groups
      zero/<parameter>/{fp32,exp_avg,exp_avg_sq,step}.pt
      frozen/<parameter or buffer>.pt             W, I and whatever else is not trained, whole
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lift_ds.refresh.carry import EXP_AVG, MOMENTS
from lift_ds.zero.partitioned import assign

#: Folder of what is not trained.
FROZEN = "frozen"

_STATES = ("fp32", *MOMENTS)

#: Entries of a ZeRO-1 or ZeRO-2 optimizer state that are a rank's own part.
_SHARDED = {"base_optimizer_state", "single_partition_of_fp32_groups", "param_slice_mappings"}

#: Entries of DeepSpeed's model states that are weights, or describe how they were split.
_WEIGHTS = {"module", "frozen_param_shapes", "frozen_param_fragments", "param_shapes", "optimizer"}


class SavedRun:
    """The files of a DeepSpeed checkpoint, opened where they lie: tensors are read when they are used.

    Args:
        folder: the checkpoint, the folder named by its tag.
        ranks: how many saved it.
        stage: ZeRO stage it was saved in.

    Raises:
        ValueError: a file is missing, or holds no states (stage 0, states offloaded to NVMe).
    """

    def __init__(self, folder: Path, ranks: int, stage: int) -> None:
        if stage not in (1, 2, 3):
            raise ValueError(f"{folder}: saved in ZeRO stage {stage}; that loads on any number of ranks as it is")
        self._stage = stage
        per_rank = "zero_pp_rank_{}_mp_rank_00_model_states.pt"
        names = [per_rank.format(rank) for rank in range(ranks)] if stage == 3 else ["mp_rank_00_model_states.pt"]
        self.models = [_open(folder / name) for name in names]
        self._files = [_open(_optimizer_file(folder, rank)) for rank in range(ranks)]
        self._optimizers = [file["optimizer_state_dict"] for file in self._files]
        inner = "optimizer_state_dict" if stage == 3 else "base_optimizer_state"
        self._inner = [states[inner] for states in self._optimizers]
        if any(EXP_AVG not in state for states in self._inner for state in states["state"].values()):
            raise ValueError(f"{folder}: has no moments (saved before the first step, or offloaded to NVMe)")

    @property
    def step(self) -> Tensor:
        """Adam's count of steps."""
        return torch.tensor(float(self._inner[0]["state"][0]["step"]))

    def optimizer_state(self) -> dict[str, Any]:
        """What all ranks share, with the keys that stages 1 and 2 read and those that stage 3 does."""
        shared = {key: value for key, value in self._optimizers[0].items() if key not in _SHARDED}
        for own in ("optimizer_state_dict", "fp32_flat_groups", "ds_zero_partition_groups"):
            shared.pop(own, None)
        groups = [{**group, "params": []} for group in self._inner[0]["param_groups"]]
        state = {"state": {0: {"step": self.step}}, "param_groups": groups}
        version = self._files[0]["ds_version"]
        return {"ds_version": version, **shared, "param_groups": groups, "optimizer_state_dict": state}

    def trained(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield name, and master and moments in the shape of the parameter, of all that is trained."""
        pieces = self._pieces_of_stage_3 if self._stage == 3 else self._pieces_of_stage_1_and_2
        for group, shapes in enumerate(self.models[0]["param_shapes"]):
            for name, shape, found in pieces(group, shapes):
                whole = {key: torch.cat(found[key]) for key in _STATES}
                if any(tensor.numel() != shape.numel() for tensor in whole.values()):
                    raise ValueError(f"{name}: {whole['fp32'].numel()} of its {shape.numel()} values were saved")
                yield name, {key: tensor.view(shape) for key, tensor in whole.items()}

    def _flat(self, rank: int, group: int) -> dict[str, Tensor]:
        masters = "fp32_flat_groups" if self._stage == 3 else "single_partition_of_fp32_groups"
        return {"fp32": self._optimizers[rank][masters][group], **self._inner[rank]["state"][group]}

    def _pieces_of_stage_1_and_2(self, group: int, shapes: Any) -> Iterator[tuple[str, torch.Size, dict[str, Any]]]:
        """Each rank holds one stretch of the flat group, which may begin and end within a parameter."""
        for name, shape in shapes.items():
            found: dict[str, list[Tensor]] = {key: [] for key in _STATES}
            for rank, states in enumerate(self._optimizers):
                address = states["param_slice_mappings"][group].get(name)
                if address is not None:
                    flat = self._flat(rank, group)
                    for key in _STATES:
                        found[key].append(flat[key].view(-1).narrow(0, address.start, address.numel))
            yield name, shape, found

    def _pieces_of_stage_3(self, group: int, shapes: Any) -> Iterator[tuple[str, torch.Size, dict[str, Any]]]:
        """Each rank holds 1/N of every parameter of the sub-group, the last ones padded."""
        ranks, offset = len(self._optimizers), 0
        for name, shape in shapes.items():
            share = math.ceil(shape.numel() / ranks)
            found: dict[str, list[Tensor]] = {key: [] for key in _STATES}
            for rank in range(ranks):
                length = max(0, min(share, shape.numel() - rank * share))
                flat = self._flat(rank, group)
                for key in _STATES:
                    found[key].append(flat[key].view(-1).narrow(0, offset, length))
            offset += share
            yield name, shape, found

    def untrained(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and value of the frozen parameters and the buffers."""
        first = self.models[0]
        trained = {name for shapes in first["param_shapes"] for name in shapes}
        shapes = first["frozen_param_shapes"] if self._stage == 3 else {}
        for name, shape in shapes.items():
            shards = [model["frozen_param_fragments"][name].view(-1) for model in self.models]
            yield name, torch.cat(shards)[: shape.numel()].view(shape)
        for name, value in first["module"].items():
            is_placeholder = self._stage == 3 and name not in first["buffer_names"]
            if name not in trained and name not in shapes and not is_placeholder:
                yield name, value

    def counters(self) -> dict[str, Any]:
        """Return the model states without weights: steps, schedule, client state."""
        rest = {key: value for key, value in self.models[0].items() if key not in _WEIGHTS}
        return {"module": {}, "optimizer": None, **rest}


def write_universal(run: SavedRun, folder: Path) -> int:
    """Write the universal form of a saved run; one tensor is whole in memory at a time.

    Args:
        run: the checkpoint to convert.
        folder: an existing folder.

    Returns:
        How many tensors were trained, and how many were not.
    """
    count = 0
    for name, states in run.trained():
        (folder / "zero" / name).mkdir(parents=True)
        for key, tensor in states.items():
            torch.save({"param": tensor.clone(), "cat_dim": 0}, folder / "zero" / name / f"{key}.pt")
        torch.save(run.step, folder / "zero" / name / "step.pt")
        count += 1
    torch.save(run.optimizer_state(), folder / "zero" / "optimizer_state.pt")
    (folder / FROZEN).mkdir()
    for name, tensor in run.untrained():
        torch.save(tensor.clone(), folder / FROZEN / f"{name}.pt")
        count += 1
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        torch.save(run.counters(), folder / name)
    return count


@torch.no_grad()
def restore(model: nn.Module, wrapper: Any, folder: Path | str) -> None:
    """Bring back what DeepSpeed's loading of a universal checkpoint leaves out; no collective but the wrapper's own.

    Every rank reads the files, and of a partitioned parameter only its shard.

    Args:
        model: DeepSpeed has loaded the checkpoint into it and its optimizer.
        wrapper: DeepSpeed's optimizer.
        folder: of the universal checkpoint.

    Raises:
        ValueError: it lacks a frozen parameter or a buffer of the model.
    """
    _restore_groups(wrapper, torch.load(Path(folder) / "zero" / "optimizer_state.pt", weights_only=False))
    if hasattr(wrapper, "checkpoint_event_prologue"):
        wrapper.checkpoint_event_prologue()
    for name, target in _untrained(model):
        path = Path(folder) / FROZEN / f"{name}.pt"
        if not path.is_file():
            raise ValueError(f"{path} is missing: a universal checkpoint of another model")
        assign(target, torch.load(path, mmap=True, weights_only=True))
    if hasattr(wrapper, "checkpoint_event_epilogue"):
        wrapper.checkpoint_event_epilogue()


def _restore_groups(wrapper: Any, saved: dict[str, Any]) -> None:
    inner = wrapper.optimizer
    for group, settings in zip(inner.param_groups, saved["param_groups"], strict=True):
        group.update({key: value for key, value in settings.items() if key != "params"})
    for parameter, state in inner.state.items():
        # Stage 3 gives all its sub-groups one tensor, which every one of them would count up.
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].to(parameter.device, copy=True)


def _untrained(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    saved = model.state_dict(keep_vars=True)  # persistent buffers, and parameters that share a tensor under one name
    seen: set[int] = set()
    for name, tensor in saved.items():
        if not tensor.requires_grad and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def _optimizer_file(folder: Path, rank: int) -> Path:
    name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    return folder / f"bf16_{name}" if (folder / f"bf16_{name}").exists() else folder / name


def _open(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} is missing: not a checkpoint of DeepSpeed without tensor parallelism")
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
