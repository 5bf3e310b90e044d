"""What the jobs of this folder are given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

#: Eight steps, a checkpoint at the fourth, a refresh after every third.
FLAGS = (
    *("--max_steps", 8, "--save_strategy", "steps", "--save_steps", 4, "--refresh_interval", 3),
    *("--budget_rank", 4, "--lra_rank", 8, "--per_device_train_batch_size", 2, "--learning_rate", "2e-3"),
    *("--logging_steps", 1, "--gradient_checkpointing", False, "--eval_split_size", 4, "--stall_timeout", 60),
)


@dataclass(frozen=True)
class Given:
    """What the jobs are given."""

    base: Path
    rows: Path

    def variables(self, output: Path, **more: str) -> dict[str, str]:
        return {"MODEL": str(self.base), "DATA": str(self.rows), "OUTPUT": str(output), **more}
