"""What is to be evaluated, and how."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class EvaluationRequest:
    """What is to be measured of a model.

    Args:
        model: a name on the Hub; a folder: a saved model, a PEFT adapter, or a checkpoint of the trainer; or a delta.
        tasks: names of tasks and groups, of the harness or of this package.
        data: folder of local test files; None for those that the tasks name on the Hub.
        rows: files of instruction rows with an `answer`, each a task of its own.
        loss_on: files whose loss per token is measured.
        kl_on: files on which the model is compared with `base`.
        base: the model before training; like `model`. A delta is applied to it; None for the one that the delta names.
        limit: most rows of each task and file; None for all.
        batch_size: sequences of a forward.
        max_new_tokens: most tokens of a generated text; None for what each task says.
        window: most tokens of a row, and length of the pieces of a plain text, for losses and KL.
        dtype: of the weights; "auto" for that of the checkpoint.
        device: such as "cuda:1"; None for the accelerator, else the CPU.
        seed: of everything random in the harness; greedy generation and scores use none of it.
        samples: file for each row's prompt, generated text and score, as JSON lines.

    Raises:
        ValueError: nothing is asked for, a number is below 1, or settings do not fit together.
    """

    model: str | None = None
    tasks: tuple[str, ...] = ()
    data: str | None = None
    rows: tuple[str, ...] = ()
    loss_on: tuple[str, ...] = ()
    kl_on: tuple[str, ...] = ()
    base: str | None = None
    limit: int | None = None
    batch_size: int = 8
    max_new_tokens: int | None = None
    window: int = 1024
    dtype: str = "auto"
    device: str | None = None
    seed: int = 0
    samples: str | None = None

    def __post_init__(self) -> None:
        if not (self.tasks or self.rows or self.loss_on or self.kl_on):
            raise ValueError("nothing to evaluate: give --tasks, --rows, --loss_on, or --kl_on with --base")
        for name in ("limit", "batch_size", "max_new_tokens", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value} is below 1; give a whole number of at least 1")
        if self.window < 2:
            raise ValueError(f"--window {self.window} leaves no token to predict; give at least 2")
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype {self.dtype!r} is unknown; valid are {', '.join(DTYPES)}")
        for name in ("tasks", "rows", "loss_on", "kl_on"):
            twice = [given for given, times in Counter(getattr(self, name)).items() if times > 1]
            if twice:
                raise ValueError(f"--{name} names {twice[0]!r} more than once")
        if self.data is not None and not self.tasks:
            raise ValueError(f"--data {self.data} is for --tasks, and none are named")
        if self.samples is not None and not (self.tasks or self.rows):
            raise ValueError(f"--samples {self.samples}: only --tasks and --rows have rows to write")
        for name in ("rows", "loss_on", "kl_on"):
            for path in getattr(self, name):
                if not Path(path).is_file():
                    raise ValueError(f"--{name} {path}: there is no such file")
