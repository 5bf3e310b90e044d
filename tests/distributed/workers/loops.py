"""One small case trained by every loop LIFT fits into; saves the final weights and the refreshes of each.

Arguments: the folder, then which loops to run. Accelerate keeps one global state per process, so those with DeepSpeed
and those without go into launches of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import cases
import engines
import torch
from datasets import Dataset
from sentences import tokenizer
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import lift_ds

STEPS = 12
# With the usual eps of 1e-8 the rounding of vanishing gradients, which differs between losses, becomes whole updates.
SETTINGS = lift_ds.LiftConfig(
    budget_rank=4,
    lra_rank=4,
    refresh_interval=5,
    solver="svd",
    lr=2e-4,
    eps=1e-6,
    weight_decay=0.1,
    extra_trainable=("norm.weight",),
)
Result = tuple[torch.nn.Module, list[int]]


def adam_settings() -> dict[str, Any]:
    return {"lr": SETTINGS.lr, "betas": SETTINGS.betas, "eps": SETTINGS.eps, "weight_decay": SETTINGS.weight_decay}


def adam(model: torch.nn.Module) -> lift_ds.LiftAdamW:
    return lift_ds.LiftAdamW(model, **adam_settings())


def adam_for_trainer(model: torch.nn.Module) -> tuple[type[lift_ds.LiftAdamW], dict[str, Any]]:
    """LiftAdamW as a Trainer takes it, which passes "model" on as the first argument."""
    return lift_ds.LiftAdamW, {"model": model, **adam_settings()}


def plain() -> Result:
    """Plain PyTorch, the whole batch on every rank."""
    model = lift_ds.attach(cases.build("llama"), SETTINGS)
    optimizer = adam(model)
    for step in range(STEPS):
        cases.loss_of(model, "llama", step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, [report.step for report in optimizer.driver.reports]


def deepspeed_loop() -> Result:
    """A hand-written loop around `lift_ds.initialize`, with the model and the optimizer built by the caller."""
    model = lift_ds.attach(cases.build("llama"), SETTINGS)
    engine, *_ = lift_ds.initialize(model=model, optimizer=adam(model), config=engines.ds_config(2))
    engines.train(engine, "llama", range(STEPS))
    return model, [report.step for report in engine.optimizer.driver.reports]


def rows() -> Dataset:
    """The batches of the case as rows, in order."""
    tokens = [row.tolist() for step in range(STEPS) for row in cases.token_batch(step)]
    return Dataset.from_dict({"input_ids": tokens, "labels": tokens})


def arguments(kind: type[TrainingArguments], deepspeed: dict[str, Any] | None, **more: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "learning_rate": SETTINGS.lr,
        "adam_beta1": SETTINGS.betas[0],
        "adam_beta2": SETTINGS.betas[1],
        "adam_epsilon": SETTINGS.eps,
        "weight_decay": SETTINGS.weight_decay,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 2,
        "max_steps": STEPS,
        "train_sampling_strategy": "sequential",
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return kind(output_dir=sys.argv[1], deepspeed=deepspeed, **settings, **more)


def zero(stage: int) -> dict[str, Any]:
    """A DeepSpeed configuration with what the Trainer fills in."""
    config = engines.ds_config(stage, zero_allow_untested_optimizer=True)
    return config | {"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto", "bf16": {"enabled": "auto"}}


def run_trainer(trainer: Trainer, model: torch.nn.Module) -> Result:
    callback = lift_ds.LiftCallback()
    trainer.add_callback(callback)
    trainer.train()
    history = [entry["step"] for entry in trainer.state.log_history if "lift_churn" in entry]
    return model, history


def hf_trainer(stage: int | None) -> Result:
    """transformers' Trainer with LiftAdamW; without DeepSpeed it wraps the model in DDP."""
    args = arguments(TrainingArguments, None if stage is None else zero(stage))
    model = lift_ds.attach(cases.build("llama"), SETTINGS)
    trainer = Trainer(model=model, args=args, train_dataset=rows(), optimizer_cls_and_kwargs=adam_for_trainer(model))
    return run_trainer(trainer, model)


def trainer_own_adamw() -> Result:
    """transformers' Trainer with the AdamW it builds itself."""
    model = lift_ds.attach(cases.build("llama"), SETTINGS)
    trainer = Trainer(model=model, args=arguments(TrainingArguments, zero(2)), train_dataset=rows())
    return run_trainer(trainer, model)


def trainer_groups() -> Result:
    """transformers' Trainer handing its own parameter groups to LiftAdamW."""
    model = lift_ds.attach(cases.build("llama"), SETTINGS)
    settings = {"lr": SETTINGS.lr, "betas": SETTINGS.betas, "eps": SETTINGS.eps}
    args = arguments(TrainingArguments, zero(2))
    trainer = Trainer(
        model=model, args=args, train_dataset=rows(), optimizer_cls_and_kwargs=(lift_ds.LiftAdamW, settings)
    )
    return run_trainer(trainer, model)


def trainer_ddp_instance() -> Result:
    """transformers' Trainer without DeepSpeed, with a LiftAdamW the caller has built."""
    model = lift_ds.attach(cases.build("llama"), SETTINGS)
    args = arguments(TrainingArguments, None)
    return run_trainer(Trainer(model=model, args=args, train_dataset=rows(), optimizers=(adam(model), None)), model)


def sft_trainer(stage: int) -> Result:
    """TRL's SFTTrainer on the same rows."""
    args = arguments(SFTConfig, zero(stage), max_length=None, loss_type="nll")
    model = lift_ds.attach(cases.build("llama"), SETTINGS)
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=rows(),
        processing_class=tokenizer(),
        optimizer_cls_and_kwargs=adam_for_trainer(model),
    )
    return run_trainer(trainer, model)


LOOPS: dict[str, Callable[[], Result]] = {
    "plain": plain,
    "deepspeed": deepspeed_loop,
    "trainer-zero2": lambda: hf_trainer(2),
    "trainer-zero3": lambda: hf_trainer(3),
    "trainer-own-adamw": trainer_own_adamw,
    "trainer-groups": trainer_groups,
    "trainer-ddp": lambda: hf_trainer(None),
    "trainer-ddp-instance": trainer_ddp_instance,
    "sft-zero2": lambda: sft_trainer(2),
}

if __name__ == "__main__":
    engines.start()
    results: dict[str, Any] = {}
    for loop in sys.argv[2:]:
        model, refreshes = LOOPS[loop]()
        results[loop] = {"weights": engines.whole_weights(model), "refreshes": refreshes}
        lift_ds.detach(model)
    engines.finish(sys.argv[1], results)
