"""One run: `lift-ds train`, then `lift-ds evaluate`, each in a process of its own, and the row of both."""

from __future__ import annotations

import json
import shlex
import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from benchmarks.measure.records import surroundings
from benchmarks.measure.tables import FAILED, OK, Row
from benchmarks.methods.cells import BASE, COUNT, Cell
from benchmarks.methods.forked import run_forked
from benchmarks.methods.studies import EXACT_MATCH, Study, Task
from benchmarks.methods.table import row_of
from benchmarks.methods.texts import Material
from lift_ds.evaluation import command as evaluation
from lift_ds.evaluation import harness
from lift_ds.training import main as training
from lift_ds.training.record import RECORD

assert harness  # evaluation imports it when it is used; imported here, no forked run has to

_REPOSITORY = Path(__file__).parents[2]


class RunError(RuntimeError):
    """A command of a run failed; the message is the last line that it wrote."""


@dataclass(frozen=True)
class Runs:
    """Where the runs of a study happen.

    Args:
        study: what is compared.
        model: folder of the base model.
        data: folder of the data.
        output: folder of the study.
        material: the study's files.
    """

    study: Study
    model: Path
    data: Path
    output: Path
    material: Material

    @cached_property
    def around(self) -> Row:
        """The columns that say on what and with what all runs are."""
        found = surroundings(("transformers", "peft", "lm_eval"))
        return {**found["versions"], "cpu": found["hardware"]["cpu"], "cores": found["hardware"]["cores"]} | {
            "commit": commit()
        }

    def trained(self, cell: Cell) -> Path:
        """Return the folder of the trained model."""
        return self.output / "runs" / cell.name

    def train_arguments(self, cell: Cell) -> list[str]:
        """Return what follows `lift-ds train` for a cell."""
        task, method = self.study.task(cell.task), self.study.method(cell.method)
        flags = {
            "model_name_or_path": self.model, "train_file": self.material.training(task),
            "output_dir": self.trained(cell), "max_steps": task.steps, "per_device_train_batch_size": task.batch,
            "max_length": task.max_length, "learning_rate": f"{cell.learning_rate:g}", "seed": cell.seed,
            "eval_split_size": 0, "save_strategy": "no", "report_to": "none", "logging_first_step": "true",
        }  # fmt: skip
        given = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
        return [*given, *self.study.flags, *task.flags, *method.flags]

    def evaluate_arguments(self, cell: Cell) -> list[list[str]]:
        """Return what follows `lift-ds evaluate` for a cell, in each of its calls: only tasks that are asked of other
        questions than the study's own have a limit.
        """
        task, material = self.study.task(cell.task), self.material
        model = self.model if cell.method == BASE else self.trained(cell)
        asked = ["--rows", material.answers(task, cell.phase), "--max_new_tokens", task.new_tokens]
        own = [
            *(model, *(asked if _is_asked(task, cell) else ())),
            *("--loss_on", material.outputs(task, cell.phase), material.texts),
            *("--base", self.model, "--kl_on", material.prompts, "--output", self._evaluated(cell, "own")),
        ]
        others = [
            *(model, "--tasks", *self.study.commonsense, "--data", self.data, "--limit", self.study.limit),
            *("--output", self._evaluated(cell, "commonsense")),
        ]
        calls = [own, others] if self.study.commonsense and cell.phase == COUNT else [own]
        return [[str(word) for word in (*call, *self.study.evaluation)] for call in calls]

    def _evaluated(self, cell: Cell, part: str) -> Path:
        return self.output / "evaluations" / f"{cell.name}.{part}.json"

    def commands(self, cell: Cell) -> Row:
        """Return the columns with the commands of a cell, by which each can be repeated."""
        train = None if cell.method == BASE else shlex.join(["lift-ds", "train", *self.train_arguments(cell)])
        evaluate = [shlex.join(["lift-ds", "evaluate", *call]) for call in self.evaluate_arguments(cell)]
        return {"command": train, "evaluation": " && ".join(evaluate)}

    def run(self, cell: Cell) -> Row:
        """Train and evaluate; the trained model is deleted afterwards, the logs stay.

        Returns:
            The row of the cell, also of a run that failed.
        """
        row = row_of(cell) | self.around | self.commands(cell)
        row["date"] = surroundings(())["date"]
        shutil.rmtree(self.trained(cell), ignore_errors=True)  # of a run that was killed
        try:
            if cell.method != BASE:
                row |= self._train(cell)
            row |= self._evaluate(cell)
        except RunError as error:
            return row | {"status": FAILED, "error": str(error)}
        finally:
            shutil.rmtree(self.trained(cell), ignore_errors=True)
        return row | {"status": OK}

    def _train(self, cell: Cell) -> Row:
        arguments = self.train_arguments(cell)
        ended = run_forked(partial(training.run, arguments), self.output / "logs" / f"{cell.name}.train.log")
        if ended.code:
            raise RunError(f"lift-ds train ended with {ended.code}: {ended.last_line}")
        record = json.loads((self.trained(cell) / RECORD).read_text())
        took = record["training"]
        return {
            "steps": took["steps"], "tokens": took["tokens"], "trained_entries": took["trained_entries"],
            "first_loss": took["first_logged_loss"], "training_seconds": took["seconds"],
            "training_peak_bytes": ended.peak_bytes, "training_peak_device_bytes": took["peak_device_bytes"],
            "device": record["device"],
        }  # fmt: skip

    def _evaluate(self, cell: Cell) -> Row:
        began, peak = time.monotonic(), 0
        self._evaluated(cell, "").parent.mkdir(parents=True, exist_ok=True)
        for number, call in enumerate(self.evaluate_arguments(cell), 1):
            log = self.output / "logs" / f"{cell.name}.evaluate{number}.log"
            ended = run_forked(partial(evaluation.main, call), log)
            if ended.code:
                raise RunError(f"lift-ds evaluate ended with {ended.code}: {ended.last_line}")
            peak = max(peak, ended.peak_bytes)
        seconds = round(time.monotonic() - began, 2)
        return self._measures(cell) | {"evaluation_seconds": seconds, "evaluation_peak_bytes": peak}

    def _measures(self, cell: Cell) -> Row:
        """Return the columns that the evaluations of a cell fill."""
        task, material = self.study.task(cell.task), self.material
        own = json.loads(self._evaluated(cell, "own").read_text())
        answers, outputs = material.answers(task, cell.phase), material.outputs(task, cell.phase)
        found: Row = {
            "exact_match": own["tasks"][answers.stem]["metrics"]["acc"]["value"] if _is_asked(task, cell) else None,
            "target_loss": own["loss"][str(outputs)]["value"],
            "general_loss": own["loss"][str(material.texts)]["value"],
            "divergence": own["kl"][str(material.prompts)]["value"],
        }
        if self.study.commonsense and cell.phase == COUNT:
            tasks = json.loads(self._evaluated(cell, "commonsense").read_text())["tasks"]
            shares = {name: tasks[name]["metrics"]["acc"]["value"] for name in self.study.commonsense}
            found |= shares | {"commonsense": statistics.fmean(shares.values())}
        return found


def _is_asked(task: Task, cell: Cell) -> bool:
    """Tell whether answers are generated: always in the test, and for a learning rate where they decide."""
    return cell.phase == COUNT or task.decides == EXACT_MATCH


def commit() -> str:
    """Return the commit of this repository, with a + where files differ from it; empty without git."""

    def ask(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=_REPOSITORY, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return ask("rev-parse", "--short=12", "HEAD") + (
            "+" if ask("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
