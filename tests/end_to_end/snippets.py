"""Runs the Python of the documentation, each block in a process forked after the imports, which cost most.

python snippets.py FOLDER     writes results.json there: block -> exit code, output, and what it trained
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import accelerate
import cases
import deepspeed
import peft
import torch
import transformers
import trl
from datasets import Dataset
from forked import alone
from pages import REPOSITORY, Block, blocks
from safetensors.torch import load_file
from sentences import reward, sentences, t5, tokenizer, translations

import lift_ds
from lift_ds.model.attachment import attachment_of
from lift_ds.runtime.ports import free_port

IMPORTED = (accelerate, deepspeed, peft, transformers, trl)  # before the fork

LIMIT = 120

#: What a page's reader does next, where a block stops short of training.
AFTER = {
    "README.md:trainer": "trainer.train()",
    "docs/your_own_script.md:class": "trainer.add_callback(lift_ds.LiftCallback()); trainer.train()",
    "docs/settings.md:gradient": "model(**batches[0]).loss.backward(); optimizer.step()",
    "docs/your_own_script.md:bind": "engine.backward(engine(**batches[0]).loss); engine.step()",
}

#: Blocks that DeepSpeed's ranks run.
DISTRIBUTED = {"README.md:deepspeed", "docs/your_own_script.md:deepspeed", "docs/your_own_script.md:bind"}

#: Blocks that train nothing.
NOT_TRAINING = {
    "docs/your_own_script.md:config", "docs/evaluation.md:evaluate", "docs/settings.md:criterion",
    "docs/deltas.md:deltas",
}  # fmt: skip


def batches() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": tokens, "labels": tokens} for tokens in map(cases.token_batch, range(3))]


def given(folder: Path) -> dict[str, Any]:
    """What the pages take for given, by the names they use."""
    rows = [{"input_ids": row, "labels": row} for row in cases.token_batch(0)]
    return {
        "MODEL": str(folder / "llama"), "T5": str(folder / "t5"), "BATCH": 2, "rows": rows, "batches": batches(),
        "prompts": Dataset.from_dict({"prompt": sentences(1, 4, 2)}), "reward": reward, "tokenizer": tokenizer(),
        "pairs": Dataset.from_dict(
            {"prompt": sentences(1, 4, 8), "chosen": sentences(2, 5, 8), "rejected": sentences(3, 5, 8)}
        ),
        "translations": translations(8),
        "ds_config": {"train_micro_batch_size_per_gpu": 4, "zero_allow_untested_optimizer": True,
                      "zero_optimization": {"stage": 2}},
    }  # fmt: skip


def begun(block: Block, names: dict[str, Any]) -> dict[str, Any]:
    """Add what the page has done before this block, where the block goes on from there."""
    if block.page == "README.md":
        names |= {
            "model": transformers.AutoModelForCausalLM.from_pretrained(names["MODEL"]),
            "args": transformers.TrainingArguments("tuned", use_cpu=True, report_to="none"),
            "Trainer": transformers.Trainer,
        }
        exec("import lift_ds", names)
        return names
    if block.page == "docs/evaluation.md":
        Path("skill.json").write_text(json.dumps([{"instruction": "t2 t3", "answer": "4"}]))
        Path("held_out.json").write_text(json.dumps([{"prompt": "t2 t3", "completion": "t4"}]))
        return names | {"model": transformers.AutoModelForCausalLM.from_pretrained(names["MODEL"])}
    if block.page == "docs/deltas.md":
        model = transformers.AutoModelForCausalLM.from_pretrained(names["MODEL"])
        model.save_pretrained("base")
        with torch.no_grad():
            model.model.norm.weight += 1
            model.lm_head.weight[0, 0] += 1
        model.save_pretrained("tuned")
        return names
    if block.page == "docs/settings.md":
        exec("import lift_ds", names)
        return names | {"model": transformers.AutoModelForCausalLM.from_pretrained(names["MODEL"])}
    exec(config_of(block.page), names)
    if block.name == "class":
        model = transformers.AutoModelForCausalLM.from_pretrained(names["MODEL"])
        names |= {
            "model": lift_ds.attach(model, names["config"]),
            "args": transformers.TrainingArguments("tuned", use_cpu=True, report_to="none"),
            "Trainer": transformers.Trainer,
        }
    return names


def config_of(page: str) -> str:
    return next(block.text for block in blocks("python") if block.page == page and block.name == "config")


def execute(block: Block, folder: Path) -> None:
    """Run a block in a folder of its own, and write what it trained to `trained.json` there."""
    (folder / "here" / "ds_configs").parent.mkdir(parents=True)
    (folder / "here" / "ds_configs").symlink_to(REPOSITORY / "ds_configs")
    os.chdir(folder / "here")
    if str(block) in DISTRIBUTED:
        one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
        os.environ.update(one, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    names = begun(block, given(folder.parent))
    text = block.text
    if not torch.accelerator.is_available():  # TRL's settings ask for bf16 on a device
        text = re.sub(r"(DPO|GRPO)Config\(", r"\1Config(use_cpu=True, output_dir=", text)
    exec(compile(text, str(block), "exec"), names)
    exec(AFTER.get(str(block), ""), names)
    Path("trained.json").write_text(json.dumps({} if str(block) in NOT_TRAINING else trained(names)))


def trained(names: dict[str, Any]) -> dict[str, Any]:
    """Count the entries that differ from the base: of the saved model where there is one, else of the one in memory."""
    model = names["model"]
    model = getattr(model, "module", model)
    saved = Path("tuned/model.safetensors")
    base = load_file(Path(names["T5" if "T5ForConditional" in type(model).__name__ else "MODEL"]) / "model.safetensors")
    if attachment_of(model) is not None:
        lift_ds.detach(model)
    found = load_file(saved) if saved.exists() else model.state_dict()
    changed = {name: int((found[name] != weight).sum()) for name, weight in base.items()}
    managed = {
        name for name, weight in base.items() if weight.dim() == 2 and not name.startswith(("lm_head", "shared"))
    }
    managed = {name for name in managed if "embed" not in name and "relative_attention_bias" not in name}
    return {
        "keys": sorted(found) == sorted(base) if saved.exists() else set(found) >= set(base),
        "share": sum(changed[name] for name in managed) / sum(base[name].numel() for name in managed),
        "others": sum(number for name, number in changed.items() if name not in managed),
        "saved": saved.exists(),
    }


def run(block: Block, folder: Path) -> dict[str, Any]:
    """Run a block in a child; how it ended, what it wrote, what it trained."""
    folder.mkdir()
    ended = alone(lambda: execute(block, folder), folder / "log", LIMIT)
    counts = folder / "here" / "trained.json"
    return dataclasses.asdict(ended) | {"trained": json.loads(counts.read_text()) if counts.exists() else None}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    cases.small_llama().save_pretrained(folder / "llama")
    tokenizer().save_pretrained(folder / "llama")
    t5().save_pretrained(folder / "t5")
    results = {str(block): run(block, folder / str(i)) for i, block in enumerate(blocks("python")) if block.name}
    (folder / "results.json").write_text(json.dumps(results))
