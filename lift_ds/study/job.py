"""A job: the folder through which a study, the nodes and their ranks speak about one cell, on storage that all see.

job.json        what to run, by the study
meeting.json    where the ranks meet, by the first node
rank<R>.log     output of a rank
failed.json     the first rank that failed, by its node
result.json     what was measured, by rank 0, when all ranks are done
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from lift_ds.study.cells import Cell, Sizes
from lift_ds.study.node import FAILED, JOB, write_whole

RESULT = "result.json"

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
    """

    cell: Cell
    device: str
    interface: str
    threads: int
    limit: float
    environment: dict[str, str]


def passed_on() -> dict[str, str]:
    """Return the variables of this process that ranks on other nodes need; no passwords, since they are written."""
    return {
        name: value for name, value in os.environ.items() if _PASSED_ON.fullmatch(name) and not name.endswith("TOKEN")
    }


def prepare(folder: Path, job: Job) -> None:
    """Make the folder of a job anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_whole(folder / JOB, dataclasses.asdict(job))


def read_job(folder: Path) -> Job:
    """Read what to run."""
    content = json.loads((folder / JOB).read_text())
    cell = content.pop("cell")
    return Job(cell=Cell(**{**cell, "sizes": Sizes(**cell["sizes"])}), **content)


def failure_of(folder: Path) -> str | None:
    """Return the word that was left of a failure, in one line; None without one."""
    path = folder / FAILED
    return " ".join(json.loads(path.read_text()).split()) if path.exists() else None
