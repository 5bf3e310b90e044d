"""Trainers of transformers and TRL, each training a small model by LIFT and by Algorithm 1 on dense weights.

Arguments: the folder, and ways to train ("reference", "lift", "zero2", "zero3"), in each of which every kind of trainer
trains. Accelerate keeps one global state per process, so ways with DeepSpeed and without go into launches of their own.
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
from sentences import ROWS, reward, sentences, t5, tokenizer, translations
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

import lift_ds
from lift_ds.model.attachment import attachment_of
from lift_ds.model.targets import find_targets
from lift_ds.reference import ReferenceLift

STEPS = 10
#: With Adam's usual eps of 1e-8 the rounding of vanishing gradients becomes whole updates.
SETTINGS = lift_ds.LiftConfig(
    budget_rank=4, lra_rank=4, refresh_interval=4, solver="svd", lr=4e-4, eps=1e-6, keep_base=True
)


def sizes() -> dict[str, Any]:
    return {"vocab_size": cases.VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def reward_model() -> nn.Module:
    torch.manual_seed(1)
    settings = sizes() | {"intermediate_size": 80, "pad_token_id": 0, "num_labels": 1, "max_position_embeddings": 64}
    return LlamaForSequenceClassification(LlamaConfig(**settings))


def arguments(kind: type, ds: dict[str, Any] | None, **more: Any) -> Any:
    """No clipping: the dense gradient that the reference sees has a larger norm than that of the principal values."""
    adam = {"adam_beta1": SETTINGS.betas[0], "adam_beta2": SETTINGS.betas[1], "adam_epsilon": SETTINGS.eps}
    settings = adam | {
        "output_dir": sys.argv[1], "max_steps": STEPS, "learning_rate": SETTINGS.lr, "max_grad_norm": 0.0,
        "per_device_train_batch_size": 4 // torch.distributed.get_world_size(), "gradient_checkpointing": False,
        "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "use_cpu": True,
        "bf16": False, "deepspeed": ds,
    }  # fmt: skip
    return kind(**settings | more)


Made = tuple[nn.Module, Callable[..., Trainer]]


def sft(ds: Any) -> Made:
    rows = Dataset.from_dict({"prompt": sentences(1, 6), "completion": sentences(2, 6)})
    args = arguments(SFTConfig, ds, max_length=None)
    return cases.build("llama"), lambda model, **how: SFTTrainer(
        model=model, args=args, train_dataset=rows, processing_class=tokenizer(), **how
    )


def reward_trainer(ds: Any) -> Made:
    model = reward_model()  # before the arguments, which begin the same
    rows = Dataset.from_dict({"chosen": sentences(1, 8), "rejected": sentences(2, 8)})
    args = arguments(RewardConfig, ds, max_length=None)
    return model, lambda model, **how: RewardTrainer(
        model=model, args=args, train_dataset=rows, processing_class=tokenizer(), **how
    )


def reference_of(model: nn.Module, copied: bool) -> nn.Module:
    """The model before training: a copy, or what LIFT has recorded of it."""
    return cases.build("llama") if copied or attachment_of(model) is None else lift_ds.ReferenceModel(model)


def dpo(ds: Any, copied: bool = True) -> Made:
    rows = Dataset.from_dict({"prompt": sentences(1, 4), "chosen": sentences(2, 5), "rejected": sentences(3, 5)})
    args = arguments(DPOConfig, ds, max_length=None)
    return cases.build("llama"), lambda model, **how: DPOTrainer(
        model=model,
        ref_model=reference_of(model, copied),
        args=args,
        train_dataset=rows,
        processing_class=tokenizer(),
        **how,
    )


def kto(ds: Any, copied: bool = True) -> Made:
    rows = Dataset.from_dict(
        {"prompt": sentences(1, 4), "completion": sentences(2, 5), "label": [i % 3 > 0 for i in range(ROWS)]}
    )
    args = arguments(KTOConfig, ds, max_length=None)
    return cases.build("llama"), lambda model, **how: KTOTrainer(
        model=model,
        ref_model=reference_of(model, copied),
        args=args,
        train_dataset=rows,
        processing_class=tokenizer(),
        **how,
    )


def _rollouts(trainer: type[Trainer], config: type, ds: Any) -> Made:
    rows = Dataset.from_dict({"prompt": sentences(1, 4)})
    args = arguments(config, ds, num_generations=2, max_completion_length=8, per_device_train_batch_size=4, beta=0.0)
    return cases.build("llama"), lambda model, **how: trainer(
        model=model, reward_funcs=reward, args=args, train_dataset=rows, processing_class=tokenizer(), **how
    )


def seq2seq(ds: Any) -> Made:
    args = arguments(Seq2SeqTrainingArguments, ds)
    return t5(), lambda model, **how: Seq2SeqTrainer(model=model, args=args, train_dataset=translations(), **how)


KINDS: dict[str, Callable[[Any], Made]] = {
    "sft": sft,
    "reward": reward_trainer,
    "dpo": dpo,
    "kto": kto,
    "dpo without a copy": lambda ds: dpo(ds, copied=False),
    "kto without a copy": lambda ds: kto(ds, copied=False),
    "grpo": lambda ds: _rollouts(GRPOTrainer, GRPOConfig, ds),
    "rloo": lambda ds: _rollouts(RLOOTrainer, RLOOConfig, ds),
    "seq2seq": seq2seq,
}


class Reference(torch.optim.Optimizer):
    """Algorithm 1 as an optimizer over dense weights; what LIFT trains densely beside, by torch's AdamW."""

    def __init__(self, model: nn.Module) -> None:
        targets = find_targets(model, SETTINGS)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.removesuffix(".weight") in targets.weights or name in targets.dense)
        dense = [model.get_parameter(name) for name in sorted(targets.dense)]
        weights = {name: layer.weight for name, layer in targets.weights.items()}
        super().__init__([*weights.values(), *dense], {"lr": SETTINGS.lr})
        self.reference = ReferenceLift(weights, SETTINGS)
        self.dense = torch.optim.AdamW(dense, SETTINGS.lr, SETTINGS.betas, SETTINGS.eps, 0.0) if dense else None

    def step(self, closure: Any = None) -> None:
        lr = self.param_groups[0]["lr"]
        if self.dense is not None:
            self.dense.param_groups[0]["lr"] = lr
            self.dense.step()
        self.reference.step(lr)


def trained(kind: str, how: str) -> dict[str, Any]:
    """Train; the weights, the losses that were logged, and the refreshes."""
    stage = {"zero2": 2, "zero3": 3}.get(how)
    ds = None
    if stage is not None:
        ds = engines.ds_config(stage, zero_allow_untested_optimizer=True, gradient_clipping=0.0)
        ds |= {"train_micro_batch_size_per_gpu": "auto", "bf16": {"enabled": "auto"}}
    unset_hf_deepspeed_config()  # of the trainer before: in ZeRO-3 models would be built partitioned
    model, make = KINDS[kind](ds)
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    if how == "reference":
        trainer = make(model, optimizers=(Reference(model), None))
    else:
        lift_ds.attach(model, SETTINGS)
        extra: dict[str, Any] = {}
        if kind in ("sft", "reward"):  # the others take no class of an optimizer, and train by the Trainer's own AdamW
            adam = {"lr": SETTINGS.lr, "betas": SETTINGS.betas, "eps": SETTINGS.eps}
            extra["optimizer_cls_and_kwargs"] = (lift_ds.LiftAdamW, {"model": model, **adam})
        trainer = make(model, **extra)
        trainer.add_callback(lift_ds.LiftCallback())
    trainer.train()
    weights = engines.whole_weights(model)
    log = trainer.state.log_history
    return {
        "losses": [entry["loss"] for entry in log if "loss" in entry],
        "rewards": [entry["reward"] for entry in log if "reward" in entry],
        "refreshes": [] if how == "reference" else [report.step for report in lift_ds.refreshes(model)],
        "weights": weights,
        "moved": {name for name, weight in weights.items() if not torch.equal(weight, start[name])},
    }


if __name__ == "__main__":
    engines.start()
    engines.finish(sys.argv[1], {f"{how} {kind}": trained(kind, how) for how in sys.argv[2:] for kind in KINDS})
