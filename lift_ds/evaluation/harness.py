"""Tasks, run by the lm-evaluation-harness: which of its own, which of `tasks/`, and on which data."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError
from lm_eval.api.group import Group
from lm_eval.config.group import GroupConfig
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import set_seed

from lift_ds.config import did_you_mean
from lift_ds.evaluation import local, scoring, wording
from lift_ds.evaluation.models import Loaded, greedy
from lift_ds.evaluation.request import EvaluationRequest

_OWN = Path(__file__).parent / "tasks"
_PREFIX = "lift_"

#: Tasks of the harness that are known by name -> folder of the harness that has them. Indexing all of its folders
#: takes seconds, and is left to those who name another task.
STOCK = {
    "gsm8k": "gsm8k",
    "boolq": "super_glue",
    "piqa": "piqa",
    "social_iqa": "siqa",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "openbookqa": "openbookqa",
}

#: Tasks of the harness that local rows cannot serve -> what they lack.
_LACKING = {
    "boolq": "the passage that each question is about",
    "gsm8k": "the worked examples that its prompt begins with",
}

#: Function of `scoring` -> what it needs of a row.
_CHECKS: dict[str, Callable[[str, str], None]] = {
    scoring.number.__name__: local.need_number,
    scoring.letter.__name__: local.need_letter,
    scoring.label.__name__: local.need_label,
}

#: Warnings of the harness that tell its own developers something.
_NOISE = (
    "model kwarg is not of type",
    "assuming single-process call",
    "Custom kwargs can be passed",
)

Spec = dict[str, Any]
Results = dict[str, Any]
Samples = list[dict[str, Any]]


def run(loaded: Loaded, request: EvaluationRequest) -> tuple[Results, Samples]:
    """Run the tasks, and the files of rows, that a request names.

    Args:
        loaded: the model.
        request: names them.

    Returns:
        Task or group -> metrics (value and standard error), rows, and what it was; and each row's prompt, generated
        text and score.

    Raises:
        ValueError: a task is unknown, or data are missing or cannot be used.
    """
    with _quiet(), greedy(loaded.model):
        asked = [*_asked_tasks(request), *_tasks_of_rows(request.rows)]
        lm = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, backend="causal", batch_size=request.batch_size)
        _check_room(asked, lm.max_length, request.max_new_tokens)
        set_seed(request.seed)
        # Not `simple_evaluate`, which runs `pip list` and git for a report of its own, and takes seconds for it.
        found = lm_eval.evaluate(lm, _prepared(asked, request), limit=request.limit, log_samples=True)
    assert found is not None, "this is the one process"
    return _results(found), _samples(found["samples"])


def _prepared(asked: Sequence[Any], request: EvaluationRequest) -> Any:
    """Return loaded tasks and groups as the harness takes them, with the settings of a request."""
    loaded = TaskManager(include_defaults=False).load(list(asked))  # finds nothing: all are loaded
    for task in loaded["tasks"].values():
        if request.max_new_tokens and task.config.output_type == "generate_until":
            task.set_config("generation_kwargs", {"max_gen_toks": request.max_new_tokens}, update=True)
        if task.config.num_fewshot is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(seed=request.seed)
    return loaded


def _asked_tasks(request: EvaluationRequest) -> list[Any]:
    """Load the tasks and groups that a request names, on its data."""
    if not request.tasks:
        return []
    manager = _manager(request.tasks, is_local=request.data is not None)
    return [part for name in request.tasks for part in _loaded(manager, name, request)]


def _manager(names: Sequence[str], *, is_local: bool) -> TaskManager:
    """Return the harness's index of the tasks that are named.

    Args:
        names: of tasks and groups.
        is_local: they are to run on local data, which further tasks of the harness have no form for.

    Raises:
        ValueError: a name is unknown.
    """
    folder = Path(lm_eval.tasks.__file__).parent
    known = {path.stem for path in _OWN.glob(f"{_PREFIX}*.yaml")} | STOCK.keys()
    further = [name for name in names if name not in known]
    for name in further:
        if is_local or name.startswith(_PREFIX):
            where = " that has a form for local data" if is_local else ""
            raise ValueError(f"--tasks: there is no task or group {name!r}{where}{did_you_mean(name, known)}")
    if not further:
        folders = {folder / STOCK[name] for name in names if name in STOCK}
        return TaskManager(include_path=[_OWN, *folders], include_defaults=False)
    manager = TaskManager(include_path=_OWN)
    for name in further:
        if name not in manager.all_tasks:
            hint = did_you_mean(name, known) or did_you_mean(name, manager.all_tasks)
            raise ValueError(f"--tasks: there is no task or group {name!r}{hint}")
    return manager


def _loaded(manager: TaskManager, name: str, request: EvaluationRequest) -> list[Any]:
    """Load one task or group, on local data where a folder is named."""
    if request.data is None:
        return _by_name(manager, name)
    settings = manager.task_index[name].cfg
    names = settings["task"] if name in manager.all_groups else [name]
    # Only a member of a group can be given other settings than those of its file.
    members = [_on_local_data(manager, member, Path(request.data)) for member in names]
    tasks = list(manager.load([{"group": "members", "task": members}])["tasks"].values())
    if name not in manager.all_groups:
        return tasks
    group = Group.from_config(GroupConfig(**settings))
    for task in tasks:
        group.add(task)
    return [group]


def _by_name(manager: TaskManager, name: str) -> list[Any]:
    try:
        found = manager.load([name])
    except (OSError, ValueError, DatasetGenerationError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"--tasks {name}: its data cannot be loaded ({reason}); --data names local files") from error
    groups = found.get("groups")
    return [groups[name]] if groups else list(found["tasks"].values())


def _on_local_data(manager: TaskManager, name: str, folder: Path) -> Spec:
    """Return a task with its data replaced by a local file's."""
    if name in _LACKING:
        raise ValueError(f"--tasks {name} with --data: local rows lack {_LACKING[name]}; take {_PREFIX}{name}")
    if name in wording.STOCK:
        rows = local.stock_rows(local.find_file(folder, name), name)
        return {"task": name, "training_split": None, **_data(rows)}
    path = local.find_file(folder, name.removeprefix(_PREFIX))
    return {"task": name, **_data(local.instruction_rows(path, _CHECKS[_scored_by(manager, name)]))}


def _scored_by(manager: TaskManager, name: str) -> str:
    """Return the name of the function of `scoring` that scores one of this package's tasks."""
    return str(manager.task_index[name].cfg["process_results"]).rpartition(".")[2]


def _data(rows: Dataset) -> Spec:
    """Return the settings of a task that has its rows already."""
    splits = {"test": rows, "validation": rows}
    return {"custom_dataset": lambda **_: splits, "dataset_kwargs": None}


def _tasks_of_rows(paths: Sequence[str]) -> list[Any]:
    """Make a task of each file of instruction rows, under the file's name."""
    stems = Counter(Path(path).stem for path in paths)
    specs = []
    for path in paths:
        stem = Path(path).stem
        specs.append({
            "task": stem if stems[stem] == 1 else path,
            "output_type": "generate_until",
            "test_split": "test",
            "num_fewshot": 0,
            "doc_to_text": scoring.prompt,
            "doc_to_target": scoring.expected,
            "process_results": scoring.number_or_text,
            "metric_list": [{"metric": scoring.METRIC, "aggregation": "mean", "higher_is_better": True}],
            "generation_kwargs": {"until": ["### Instruction:"], "do_sample": False, "max_gen_toks": 256},
            **_data(local.instruction_rows(Path(path))),
        })  # fmt: skip
    return list(TaskManager(include_defaults=False).load(specs)["tasks"].values()) if specs else []


def _check_room(asked: Sequence[Any], longest: int, max_new_tokens: int | None) -> None:
    """Refuse to generate more than a model has positions for."""
    for task in [task for part in asked for task in (part.get_all_tasks() if isinstance(part, Group) else [part])]:
        if task.config.output_type == "generate_until":
            new = max_new_tokens or task.config.generation_kwargs.get("max_gen_toks", 256)
            if new >= longest:
                raise ValueError(
                    f"{new} new tokens for {task.task_name} leave no room for a prompt: the model has {longest} "
                    "positions; set --max_new_tokens"
                )


def _results(found: Mapping[str, Any]) -> Results:
    """Return what the harness found, without what repeats the tasks' own files."""
    results = {}
    for name, figures in found["results"].items():
        metrics = {}
        for key, value in figures.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr"):
                continue
            error = figures.get(f"{metric}_stderr,{kind}")
            shown = metric if kind == "none" else f"{metric} ({kind})"
            metrics[shown] = {"value": value, "stderr": error if isinstance(error, float) else None}
        if not metrics:
            continue
        config = found["configs"].get(name, {})
        results[name] = {
            "metrics": metrics,
            "rows": figures.get("sample_len"),
            "fewshot": found["n-shot"].get(name),
            "version": found["versions"].get(name),
            "generation": config.get("generation_kwargs") if config.get("output_type") == "generate_until" else None,
        }
    return results


def _samples(found: Mapping[str, Any]) -> Samples:
    """Return a row's prompt, what the model gave, and its score, for all rows of all tasks."""
    rows = []
    for task, samples in found.items():
        for sample in samples:
            rows.append({
                "task": task,
                "row": sample["doc_id"],
                "prompt": sample["arguments"][0][0],
                "choices": [arguments[1] for arguments in sample["arguments"] if isinstance(arguments[1], str)],
                "given": [responses[0] for responses in sample["resps"]],
                "target": sample["target"],
                "filter": sample["filter"],
                "scores": {metric: sample[metric] for metric in sample["metrics"]},
            })  # fmt: skip
    return rows


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what the harness says that its own developers alone have a use for."""

    def is_of_use(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING and not any(part in record.getMessage() for part in _NOISE)

    # A filter of a logger is not asked about the records of those below it; one of a handler is.
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("lm_eval: %(message)s"))
    handler.addFilter(is_of_use)
    logger = logging.getLogger("lm_eval")
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates
