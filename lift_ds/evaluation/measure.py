"""One evaluation: a request in, figures out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lift_ds.evaluation import losses, models
from lift_ds.evaluation.models import Loaded
from lift_ds.evaluation.request import EvaluationRequest
from lift_ds.runtime.files import write_whole

_PACKAGES = ("lift_ds", "lm_eval", "torch", "transformers", "tokenizers", "datasets")


def evaluate(
    request: EvaluationRequest,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base_model: PreTrainedModel | None = None,
) -> dict[str, Any]:
    """Measure a model.

    Args:
        request: what to measure. `request.model` is loaded where no model is given.
        model: a model that is loaded already, without LIFT attached; it is as it was afterwards.
        tokenizer: given with it.
        base_model: the base for KL, where it is loaded already; on the device of the model.

    Returns:
        `model`, `settings`, `weights`, `versions` and `date`; `tasks`, by name: `metrics` (each a `value` and a
        `stderr`) and `rows`; `loss` and `kl`, by path: `value` in nats per token, `stderr`, `tokens`, `rows`, `cut`.

    Raises:
        ValueError: a setting, the model, a task or the data cannot be used.
        ImportError: tasks are asked for and lm_eval is not installed.
    """
    run_tasks = _harness() if request.tasks or request.rows else None
    loaded = _model(request, model, tokenizer)
    result: dict[str, Any] = {
        "model": loaded.name,
        "settings": dataclasses.asdict(request),
        "weights": {"dtype": str(loaded.model.dtype), "device": str(loaded.model.device)},
        "versions": {package: metadata.version(package) for package in _PACKAGES if _installed(package)},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "tasks": {},
        "loss": {},
        "kl": {},
    }
    if run_tasks is not None:
        result["tasks"], samples = run_tasks(loaded, request)
        if request.samples is not None:
            lines = (json.dumps(sample, ensure_ascii=False, default=str) for sample in samples)
            write_whole(request.samples, "".join(f"{line}\n" for line in lines))
    sizes = losses.Sizes(request.window, request.batch_size, request.limit)
    with models.greedy(loaded.model):
        for path in request.loss_on:
            result["loss"][path] = losses.loss(loaded, path, sizes)
        if request.kl_on:
            base = _base(request, loaded, base_model)
            for path in request.kl_on:
                result["kl"][path] = losses.divergence(loaded, base, path, sizes)
    return result


def _harness() -> Callable[..., Any]:
    try:
        from lift_ds.evaluation.harness import run
    except ModuleNotFoundError as missing:
        if missing.name is None or not missing.name.startswith("lm_eval"):
            raise
        raise ImportError(
            f"--tasks and --rows need the lm-evaluation-harness ({missing}): pip install 'lift_ds[evaluation]'"
        ) from None
    return run


def _model(
    request: EvaluationRequest, model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None
) -> Loaded:
    if model is not None:
        if tokenizer is None:
            raise ValueError("a model is given without its tokenizer")
        return Loaded(request.model or model.config.name_or_path or type(model).__name__, model, tokenizer)
    if request.model is None:
        raise ValueError("no model is named, and none is given")
    return models.load(request.model, request.dtype, request.device, base=request.base)


def _base(request: EvaluationRequest, loaded: Loaded, base_model: PreTrainedModel | None) -> PreTrainedModel:
    if base_model is not None:
        return base_model.eval()
    if request.base is None:
        raise ValueError("--kl_on compares with the model before training: name it by --base")
    return models.load(request.base, request.dtype, str(loaded.model.device), "--base").model


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def check_writable(path: str, flag: str) -> None:
    """Refuse a file that could not be written once everything is measured.

    Raises:
        ValueError: its folder is not there, or it is a folder.
    """
    if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
        raise ValueError(f"{flag} {path}: cannot be written; its folder must be there, and it must be no folder")
