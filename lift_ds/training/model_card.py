"""The card of a trained model: its base, its data, how it was trained, and what that came to."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers import SchedulerType

from lift_ds import LiftConfig
from lift_ds.runtime.versions import package_versions
from lift_ds.training.arguments import TrainArguments
from lift_ds.training.record import PACKAGES
from lift_ds.training.settings import Settings

_METHODS = {
    "lift": "LIFT ([arXiv 2506.00772](https://arxiv.org/abs/2506.00772)), which trains the entries of each matrix "
    "that are largest after a low-rank approximation and selects them again every few hundred steps",
    "full": "full fine-tuning",
    "lora": "LoRA, merged into the weights",
}


@dataclass(frozen=True)
class Trained:
    """What a card tells of a run."""

    told: Settings
    args: TrainArguments
    share: float | None  # of the managed entries, which LIFT trained; None where another method trained
    rows: int  # trained on

    def write_card(self, folder: str | Path, losses: str = "") -> None:
        """Write `README.md` into a folder.

        Args:
            folder: of the model.
            losses: a table of held-out losses as it was printed, if there is one.
        """
        head = ModelCardData(
            base_model=_on_the_hub(self.told.script.model_name_or_path),
            datasets=_on_the_hub(self.told.script.dataset_name),
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=[self.told.script.method, "sft"],
        )
        parts = [f"# {Path(folder).resolve().name}", self._sentence(), _table("Settings", self._settings())]
        if losses:
            parts.append(f"## Held-out loss\n\n```\n{losses}\n```")
        parts.append(_table("Versions", package_versions(PACKAGES) | {"python": platform.python_version()}))
        body = "\n\n".join(parts)
        ModelCard(f"---\n{head.to_yaml()}\n---\n\n{body}\n").save(Path(folder) / "README.md")

    def _sentence(self) -> str:
        base, data = (_shown(name) for name in (self.told.script.model_name_or_path, self._data()))
        return (
            f"`{base}`, fine-tuned on {self.rows:,} rows of `{data}` by "
            f"{_METHODS[self.told.script.method]}. Trained with lift_ds and TRL."
        )

    def _data(self) -> str:
        return str(self.told.script.dataset_name or self.told.script.train_file)

    def _settings(self) -> dict[str, object]:
        args = self.args
        settings: dict[str, object] = {
            "learning rate": args.learning_rate,
            "schedule": f"{SchedulerType(args.lr_scheduler_type).value}, warm-up {args.warmup_steps:g}",
            "epochs": args.num_train_epochs if args.max_steps <= 0 else f"{args.max_steps} steps",
            "sequences a step": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "longest row": args.max_length if args.max_length is not None else "no limit",
            "Adam": f"betas ({args.adam_beta1:g}, {args.adam_beta2:g}), weight decay {args.weight_decay:g}",
            "precision": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
            "seed": args.seed,
        }
        if self.share is not None:
            defaults = LiftConfig(density=1.0).to_dict()
            shown = {"budget_rank", "density", "lra_rank", "refresh_interval"}
            of_adam = {"lr", "betas", "eps", "weight_decay", "stall_timeout"}
            for name, value in self.told.lift.to_dict().items():
                if name not in of_adam and value is not None and (name in shown or value != defaults[name]):
                    settings[f"LIFT: {name}"] = value
            settings["LIFT: trained share of the managed entries"] = f"{self.share:.2%}"
        if self.told.script.method == "lora":
            settings["LoRA: rank"] = self.told.script.lora_rank
        return settings


def _on_the_hub(name: str | None) -> str | None:
    """Return a name that is one of the hub, as a card may link it; None for a folder on this machine."""
    return None if name is None or _is_here(name) else name


def _shown(name: str | None) -> str:
    """Return a name as others may read it: of a folder or file of this machine the last part."""
    return Path(str(name)).name if _is_here(str(name)) else str(name)


def _is_here(name: str) -> bool:
    return Path(name).exists() or name.startswith((".", "/", "~"))


def _table(title: str, rows: Mapping[str, object]) -> str:
    lines = [f"## {title}", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    return "\n".join(lines)
