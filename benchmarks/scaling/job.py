"""A job: the folder through which a study and the nodes speak about one cell, on storage that all see.

job.json        what to run, by the study
node<I>_*/      output of the ranks of a node
failed.txt      the first failure, by its node
result.json     what was measured, by the first node, when all its ranks are done
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.scaling.cells import Cell, Sizes
from benchmarks.scaling.node import JOB
from lift_ds.runtime.files import write_whole
from lift_ds.runtime.ports import free_port

RESULT, FAILED = "result.json", "failed.txt"

_PASSED_ON = re.compile(
    r"(PATH|LD_LIBRARY_PATH|VIRTUAL_ENV|CUDA_HOME|(HF|TRANSFORMERS|TOKENIZERS|OMP|MKL|NCCL|GLOO|UCX|TORCH|DS|LIFT_DS)_.*)"
)


@dataclass(frozen=True)
class Job:
    """One run of a cell.

    Args:
        cell: what to run.
        device: "cpu" or "cuda".
        interface: network interface of every node, over which ranks meet and whose bytes are counted.
        threads: of a rank on the CPU.
        limit: seconds after which a node ends its ranks.
        environment: variables of the ranks on all nodes.
        port: of the first node, where the ranks meet; chosen here, so it might be taken there: that cell fails.
    """

    cell: Cell
    device: str
    interface: str
    threads: int
    limit: float
    environment: dict[str, str]
    port: int = field(default_factory=free_port)


def environment_of(device: str, interface: str, threads: int) -> dict[str, str]:
    """Return the variables of the ranks on all nodes: what this process passes on, without passwords, and the job's."""
    passed_on = {
        name: value for name, value in os.environ.items() if _PASSED_ON.fullmatch(name) and not name.endswith("TOKEN")
    }
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    return {
        **passed_on, "DS_ACCELERATOR": device, "OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": interface, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **hidden,
    }  # fmt: skip


def prepare(folder: Path, job: Job) -> None:
    """Make the folder of a job anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / JOB).write_text(json.dumps(dataclasses.asdict(job)))


def read_job(folder: Path) -> Job:
    """Read what to run."""
    content = json.loads((folder / JOB).read_text())
    cell = content.pop("cell")
    return Job(cell=Cell(**{**cell, "sizes": Sizes(**cell["sizes"])}), **content)


def note_result(folder: Path, content: Any) -> None:
    """Leave what was measured, such that a reader sees all of it or no file."""
    write_whole(folder / RESULT, json.dumps(content))


def note_failure(folder: Path, text: str) -> None:
    """Leave word of a failure, unless another was first."""
    with contextlib.suppress(FileExistsError), (folder / FAILED).open("x") as file:
        file.write(text)


def failure_of(folder: Path) -> str | None:
    """Return the first line of what was left of a failure; None without one."""
    path = folder / FAILED
    return path.read_text().partition("\n")[0] if path.exists() else None
