"""The first selection on ranks: what each selects, what it has afterwards, and that a resume selects nothing.

Argument: the folder.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import cases
import deepspeed
import engines
import loops
import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainingArguments

import lift_ds
from lift_ds.model import first_selection
from lift_ds.model.attachment import attachment_of, require_attachment
from lift_ds.runtime.ranks import alone

SETTINGS = replace(loops.SETTINGS, refresh_interval=3)
#: Its subspaces are handed out too.
CHEBYSHEV = replace(SETTINGS, solver="chebyshev", selection_tolerance=1e-4)


@contextlib.contextmanager
def counted() -> Iterator[list[str]]:
    """The names of the matrices this rank selects in first, while it does."""
    names: list[str] = []
    select = first_selection.select_in

    def noted(name: str, *args: Any) -> Any:
        names.append(name)
        return select(name, *args)

    first_selection.select_in = noted
    try:
        yield names
    finally:
        first_selection.select_in = select


def found_in(model: nn.Module) -> dict[str, Any]:
    attachment = require_attachment(model)
    return {"indices": engines.whole_indices(model), "subspaces": dict(attachment.subspaces)}


def by_one_process() -> dict[str, Any]:
    found = {}
    with alone():
        for name, settings in {"svd": SETTINGS, "chebyshev": CHEBYSHEV}.items():
            model = lift_ds.attach(cases.build("llama"), settings)
            found[name] = found_in(model)
    return found


def by_attach() -> dict[str, Any]:
    with counted() as names:
        model = lift_ds.attach(cases.build("llama"), CHEBYSHEV)
    return found_in(model) | {"selected": names, "values": values_at(model)}


def values_at(model: nn.Module) -> bool:
    weights = require_attachment(model).weights.values()
    return all(weight.holds_its_values(weight.principal.index.compact()) for weight in weights)


def by_initialize(stage: int) -> dict[str, Any]:
    with counted() as names:
        engine = engines.lift_engine(cases.build("llama"), engines.ds_config(stage), SETTINGS)
    found = {"indices": engines.whole_indices(engine.module), "selected": names}
    engine.destroy()
    return found


def under_zero_init() -> dict[str, Any]:
    with deepspeed.zero.Init(config_dict_or_path=engines.ds_config(3)):
        model = cases.small_llama()
    weights = engines.whole_weights(model)
    with counted() as names:
        lift_ds.attach(model, SETTINGS)
    with alone():
        whole = cases.small_llama()
        whole.load_state_dict(weights)
        expected = engines.whole_indices(lift_ds.attach(whole, SETTINGS))
    return {"indices": engines.whole_indices(model), "selected": names, "expected": expected}


def resumed(stage: int, folder: str) -> dict[str, Any]:
    """Five steps at once, and three with a save and two after loading it into an engine that selected nothing."""
    config = engines.ds_config(stage)
    engine = engines.lift_engine(cases.build("llama"), config, SETTINGS)
    engines.train(engine, "llama", range(3))
    engine.save_checkpoint(f"{folder}/zero{stage}")
    expected = engines.train(engine, "llama", range(3, 5))
    indices = engines.whole_indices(engine.module)
    engine.destroy()
    with counted() as names:
        engine = waiting(config)
        saved_too_early = engines.message_of(lambda: engine.save_checkpoint(f"{folder}/early{stage}"))
        engine.load_checkpoint(f"{folder}/zero{stage}")
        losses = engines.train(engine, "llama", range(3, 5))
    found = {"indices": engines.whole_indices(engine.module), "expected": indices}
    engine.destroy()
    engine = waiting(config)
    trained_too_early = engines.message_of(lambda: engines.train(engine, "llama", range(1)))
    engine.destroy()
    return found | {
        "selected": names, "losses": losses, "expected_losses": expected,
        "saved_too_early": saved_too_early, "trained_too_early": trained_too_early,
    }  # fmt: skip


def waiting(config: dict[str, Any]) -> Any:
    """An engine that has selected nothing."""
    config = config | {"lift": SETTINGS.to_dict()}
    return lift_ds.initialize(model=cases.build("llama"), config=config, resume=True)[0]


def in_trainer(stage: int, folder: str) -> dict[str, Any]:
    """The Trainer's first start, which saves, and its resume."""
    found: dict[str, Any] = {}
    for name, checkpoint in (("start", None), ("resume", f"{folder}/trainer{stage}/checkpoint-4")):
        args = TrainingArguments(
            f"{folder}/trainer{stage}", deepspeed=loops.zero(stage), learning_rate=SETTINGS.lr, max_steps=6,
            per_device_train_batch_size=cases.GLOBAL_BATCH // dist.get_world_size(), lr_scheduler_type="constant",
            train_sampling_strategy="sequential", bf16=False, use_cpu=True, save_steps=4, report_to="none",
            disable_tqdm=True, logging_steps=1, max_grad_norm=0.0,
        )  # fmt: skip
        with counted() as names:
            model = lift_ds.attach(cases.build("llama"), SETTINGS, resume=checkpoint is not None)
            trainer = Trainer(
                model=model, args=args, train_dataset=loops.rows(),
                optimizer_cls_and_kwargs=loops.adam_for_trainer(model),
                callbacks=[lift_ds.LiftCallback(resume_from_checkpoint=checkpoint)],
            )  # fmt: skip
            trainer.train(resume_from_checkpoint=checkpoint)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found[name] = {"selected": names, "losses": losses[-2:], "indices": engines.whole_indices(model)}
        lift_ds.detach(model)
    return found


def of_a_broken_weight() -> dict[str, Any]:
    """A matrix of which one rank alone will find that it cannot be ranked."""
    model = cases.build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    return {
        "message": engines.message_of(lambda: lift_ds.attach(model, SETTINGS)),
        "attached": attachment_of(model) is not None,
    }


if __name__ == "__main__":
    engines.start()
    folder, many = sys.argv[1], dist.get_world_size() > 2
    results: dict[str, Any] = {"one process": by_one_process(), "attach": by_attach(), "broken": of_a_broken_weight()}
    for stage in range(4):
        results[f"initialize {stage}"] = by_initialize(stage)
    results["zero.Init"] = under_zero_init()
    for stage in () if many else range(4):
        results[f"resume {stage}"] = resumed(stage, folder)
    if not many:
        results["trainer"] = in_trainer(3, folder)
    engines.finish(folder, results)
