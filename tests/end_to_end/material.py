"""What the short runs of this folder are given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

#: Eight steps, a checkpoint at the fourth, a refresh after every third: one lies before the checkpoint, one behind.
EIGHT_STEPS = ("--max_steps", 8, "--save_strategy", "steps", "--save_steps", 4)


@dataclass(frozen=True)
class Material:
    """What a short run is given."""

    base: Path
    other_base: Path  # another width
    instructions: Path  # JSON lines of instruction, input, output
    prompts: Path  # a JSON array of prompt, completion

    def flags(self, output: Path, *more: object) -> list[object]:
        """Return the flags of a run of a few seconds: six steps with a refresh after the third and the last."""
        return [
            *("--model_name_or_path", self.base, "--train_file", self.instructions, "--output_dir", output),
            *("--max_steps", 6, "--refresh_interval", 3, "--budget_rank", 4, "--lra_rank", 8),
            *("--per_device_train_batch_size", 2, "--learning_rate", "2e-3", "--logging_steps", 1),
            *("--gradient_checkpointing", False, "--save_strategy", "no", "--eval_split_size", 4),
            *more,
        ]
