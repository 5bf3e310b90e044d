"""The record of a run, in `launch/resolved.json` of its folder: the settings and versions it was started with, and what
its training took.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments

from lift_ds import LiftConfig
from lift_ds.model.partition import logical_shape
from lift_ds.runtime.files import write_whole
from lift_ds.runtime.logs import is_main_rank
from lift_ds.runtime.ranks import from_all
from lift_ds.runtime.versions import package_versions
from lift_ds.training.arguments import adam_settings

#: In the run's folder; each start replaces it.
RECORD = Path("launch", "resolved.json")

#: Packages that the result of a run depends on.
PACKAGES = ("lift_ds", "torch", "deepspeed", "transformers", "accelerate", "trl", "datasets")


class RecordCallback(TrainerCallback):
    """Writes the record when training begins: nothing in DeepSpeed's settings is "auto" any more by then. Adds to it
    what training took when it ends.

    Args:
        config: LIFT's settings; None where another method trains.
        checkpoint: what the run resumes from.
    """

    def __init__(self, config: LiftConfig | None, checkpoint: str | None) -> None:
        self._config = config
        self._checkpoint = checkpoint

    def on_train_begin(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        hosts = from_all(socket.gethostname())
        if is_main_rank():
            write(Path(str(args.output_dir)) / RECORD, self._settled(args, hosts))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, *_: Any, model: nn.Module, **__: Any) -> None:
        if is_main_rank():
            add(str(args.output_dir), training=_what_training_took(state, model))

    def _settled(self, args: TrainingArguments, hosts: list[str]) -> dict[str, Any]:
        nodes: dict[str, list[int]] = {}
        for rank, host in enumerate(hosts):
            nodes.setdefault(host, []).append(rank)
        return {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": sys.argv,
            "world_size": len(hosts),
            "nodes": nodes,
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
            "resumes_from": self._checkpoint,
            "lift": dataclasses.asdict(self._config) | adam_settings(args) if self._config else None,
            "deepspeed": args.hf_deepspeed_config.config if args.deepspeed else None,
            "versions": {"python": platform.python_version(), **package_versions(PACKAGES)},
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        }


def _what_training_took(state: TrainerState, model: nn.Module) -> dict[str, Any]:
    """Return steps, seconds, tokens and first loss of this start, the entries trained, and the peak of the device."""
    last = {name: value for entry in state.log_history for name, value in entry.items()}
    first = next((entry["loss"] for entry in state.log_history if "loss" in entry), None)
    return {
        "steps": state.global_step,
        "seconds": last.get("train_runtime"),
        "tokens": last.get("num_tokens"),
        "first_logged_loss": first,
        "trained_entries": sum(logical_shape(p).numel() for p in model.parameters() if p.requires_grad),
        "peak_device_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }


def note_end(output_dir: str) -> None:
    """Add to the record of a run that it has finished; for one rank.

    Args:
        output_dir: the run's folder.
    """
    add(output_dir, finished=datetime.now(UTC).isoformat(timespec="seconds"))


def add(output_dir: str, **more: Any) -> None:
    """Add to the record of a run where there is one; for one rank.

    Args:
        output_dir: the run's folder.
        **more: name -> what to add; it takes the place of what has that name.
    """
    path = Path(output_dir) / RECORD
    if path.is_file():
        write(path, json.loads(path.read_text()) | more)


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a record; a reader finds the one before or this one, whole.

    Args:
        path: of the file; its folder is made where it does not exist.
        content: what JSON does not know in it (paths, infinity) is written as its text.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = json.loads(json.dumps(content, default=str), parse_constant=str)
    write_whole(path, json.dumps(plain, indent=2) + "\n")
