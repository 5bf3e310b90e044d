"""How much criteria and ranks select the same entries of a real model's matrices.

    python -m benchmarks.criteria_overlap --model models/SmolLM2-135M-Instruct --rows data/commonsense_train.json

A share is that of the entries of one selection that are in the other one too; all have the same number. By chance it
is the density. The gradients are those of the first rows of a file, in the frame of training.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import lift_ds
from benchmarks.measure.records import RESULTS, Record, write_results
from benchmarks.measure.tables import markdown_table
from lift_ds import LiftConfig
from lift_ds.model.attachment import require_attachment
from lift_ds.model.gradients import Batch
from lift_ds.training.data import normalise_row, read_rows


@dataclass(frozen=True)
class Choice:
    """A way to select.

    Args:
        name: in the table.
        config: its settings.
    """

    name: str
    config: LiftConfig


def choices_of(config: LiftConfig, ranks: list[int]) -> list[Choice]:
    """Return the ways that are compared: LIFT at several ranks, and the other criteria at the last of them."""
    of_ranks = [Choice(f"principal, r = {rank}", replace(config, lra_rank=rank)) for rank in ranks]
    names = ("magnitude", "gradient", "smallest", "random")
    return of_ranks + [Choice(name, replace(config, lra_rank=ranks[-1], criterion=name)) for name in names]


def selections(model: PreTrainedModel, config: LiftConfig, batches: list[Batch]) -> dict[str, Tensor]:
    """Return the entries that a configuration selects, flat positions by name of the matrix; the model stays plain."""
    lift_ds.attach(model, config)
    if config.criterion == "gradient":
        lift_ds.LiftAdamW(model)
        lift_ds.select_by_gradients(model, batches)
    found = {name: layer.principal_index.clone() for name, layer in require_attachment(model).weights.items()}
    lift_ds.detach(model)
    return found


def shared(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """Return for each matrix the share of the entries of one selection that are in another one."""
    return {name: float(torch.isin(index, other[name]).float().mean()) for name, index in one.items()}


def batches_of(path: Path, model: Path, count: int) -> list[Batch]:
    """Return the first rows of a file as batches of one row each, prompt and completion, all of it learned."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    batches: list[Batch] = []
    for where, raw in islice(read_rows(path), count):
        row = normalise_row(raw, where)
        tokens = tokenizer(row["prompt"] + row["completion"], return_tensors="pt").input_ids
        batches.append({"input_ids": tokens, "labels": tokens})
    return batches


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a saved model")
    parser.add_argument("--rows", type=Path, required=True, help="file with rows of instructions, for the gradients")
    parser.add_argument("--count", type=int, default=2, help="rows whose gradients are measured (2)")
    parser.add_argument("--budget_rank", type=int, default=17)
    parser.add_argument("--lra_ranks", type=int, nargs="+", default=[8, 16, 32, 128])
    parser.add_argument("--output", type=Path, default=RESULTS / "criteria_overlap.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Select by every criterion, compare each with each, print the table and write the JSON."""
    args = parse_arguments(arguments)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    batches = batches_of(args.rows, args.model, args.count)
    choices = choices_of(LiftConfig(budget_rank=args.budget_rank), args.lra_ranks)
    found = {one.name: selections(model, one.config, batches) for one in tqdm(choices, desc="selecting")}
    entries = {name: index.numel() for name, index in found[choices[0].name].items()}
    records: list[Record] = []
    for one in found:
        for other in found:
            by_matrix = shared(found[one], found[other])
            mean = sum(share * entries[name] for name, share in by_matrix.items()) / sum(entries.values())
            records.append(
                {
                    "of": one,
                    "in": other,
                    "share": mean,
                    "least": min(by_matrix.values()),
                    "most": max(by_matrix.values()),
                }
            )
    share = {(record["of"], record["in"]): record["share"] for record in records}
    rows = [[one, *(f"{100 * share[one, other]:.1f}" for other in found)] for one in found]
    print(markdown_table(["in common, %", *found], rows))
    used = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    used |= {"model": args.model.name, "rows": args.rows.name, "output": args.output.name}
    write_results(args.output, {"arguments": used, "matrices": len(entries), "records": records})


if __name__ == "__main__":
    main()
