"""How large deltas of a model are, how long they take, and how far PEFT's adapters are from the tuned model.

    python -m benchmarks.deltas --model models/SmolLM2-135M-Instruct

The tuned model is the base with a share of the entries of each linear layer changed at random: by a normal factor with
a spread of a tenth ("nudged"), or to values drawn anew, with the spread of their matrix ("redrawn"). The first is what
training does, the second what an addition of differences can stand least.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.measure.records import RESULTS, Record, surroundings, write_json
from benchmarks.measure.tables import markdown_table
from lift_ds.delta import apply_deltas, export_adapter, export_delta, inspect_delta

WEIGHTS = "model.safetensors"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
ADAPTERS = ("shira", "supertuning")

Change = Callable[[Tensor, Tensor, torch.Generator], Tensor]

#: Name -> the new values of entries, from their old ones and the matrix, both float32.
CHANGES: dict[str, Change] = {
    "nudged": lambda old, _, drawn: old * (1 + 0.1 * torch.randn(len(old), generator=drawn)),
    "redrawn": lambda old, matrix, drawn: matrix.std() * torch.randn(len(old), generator=drawn),
}


def is_linear(name: str) -> bool:
    """Tell whether a tensor of a Llama is the matrix of a linear layer in one of its blocks."""
    return name.endswith("_proj.weight")


def write_base(model: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write a model in a dtype."""
    AutoModelForCausalLM.from_pretrained(model, dtype=dtype).save_pretrained(folder, max_shard_size="100GB")


def write_tuned(base: Path, folder: Path, change: Change, share: float) -> None:
    """Write a copy of a model with entries of its linear layers changed."""
    shutil.copytree(base, folder)
    state, drawn = load_file(base / WEIGHTS), torch.Generator().manual_seed(0)
    for matrix in (tensor for name, tensor in state.items() if is_linear(name)):
        flat = matrix.view(-1)
        chosen = torch.randperm(len(flat), generator=drawn)[: round(share * len(flat))]
        flat[chosen] = change(flat[chosen].float(), matrix.float(), drawn).to(matrix.dtype)
    save_file(state, folder / WEIGHTS, {"format": "pt"})


@contextmanager
def timed(record: Record, name: str) -> Iterator[None]:
    """Note the seconds that something takes."""
    begun = time.perf_counter()
    yield
    record[name] = time.perf_counter() - begun


def measure_delta(base: Path, tuned: Path, folder: Path) -> Record:
    """Export and apply a delta; its size and share, seconds, and whether it gave the tuned weights back to the bit."""
    record: Record = {"format": "lift"}
    with timed(record, "export_seconds"):
        file = export_delta(str(base), str(tuned), folder / "delta.safetensors")
    with timed(record, "apply_seconds"):
        again = apply_deltas(str(base), [file], folder / "again")
    summary = inspect_delta(file)
    record |= {"bytes": summary.size, "changed": summary.changed, "entries": summary.entries}
    record["model_bytes"] = (tuned / WEIGHTS).stat().st_size
    record["entries_off"] = entries_off(load_file(again / WEIGHTS), load_file(tuned / WEIGHTS))
    return record | {"logits_off": None}


def measure_adapter(base: Path, tuned: Path, folder: Path, kind: str) -> Record:
    """Export an adapter and let PEFT load it; its size, and how far weights and logits are from the tuned model's."""
    record: Record = {"format": kind}
    with timed(record, "export_seconds"):
        adapter = export_adapter(str(base), str(tuned), folder / kind, kind)
    record["bytes"] = sum(path.stat().st_size for path in adapter.iterdir())
    expected = AutoModelForCausalLM.from_pretrained(tuned, dtype="auto").eval()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter).eval()
    tokens = torch.randint(0, expected.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        record["logits_off"] = float((model(tokens).logits - expected(tokens).logits).abs().max())
    record["entries_off"] = entries_off(model.merge_and_unload().state_dict(), expected.state_dict())
    return record


def entries_off(found: dict[str, Tensor], expected: dict[str, Tensor]) -> int:
    """Count the entries of linear layers that differ."""
    return sum(int((found[name] != tensor).sum()) for name, tensor in expected.items() if is_linear(name))


def measure(args: argparse.Namespace) -> list[Record]:
    """Measure every dtype, change and format."""
    records: list[Record] = []
    for dtype in args.dtypes:
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            base = Path(scratch) / "base"
            write_base(args.model, base, DTYPES[dtype])
            for name, change in CHANGES.items():
                folder = Path(scratch) / name
                folder.mkdir()
                tuned = folder / "tuned"
                write_tuned(base, tuned, change, args.share)
                found = [measure_delta(base, tuned, folder)]
                found += [measure_adapter(base, tuned, folder, kind) for kind in ADAPTERS]
                records += [{"dtype": dtype, "change": name, **record} for record in found]
                shutil.rmtree(folder)
    return records


def table(records: list[Record]) -> str:
    """Return the figures as a table of Markdown."""
    heads = ["dtype", "change", "format", "MB", "export, s", "apply, s", "entries off", "logits off"]
    return markdown_table(heads, [_row(record) for record in records])


def _row(record: Record) -> list[str]:
    apply, logits = record.get("apply_seconds"), record["logits_off"]
    return [
        record["dtype"],
        record["change"],
        record["format"],
        f"{record['bytes'] / 1e6:.1f}",
        f"{record['export_seconds']:.1f}",
        "" if apply is None else f"{apply:.1f}",
        f"{record['entries_off']:,}",
        "" if logits is None else f"{logits:.2g}",
    ]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a saved model, a Llama")
    parser.add_argument("--share", type=float, default=0.05, help="of the entries of each linear layer (0.05)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=[*DTYPES])
    parser.add_argument("--scratch", type=Path, help="folder for copies of the model (the system's)")
    parser.add_argument("--output", type=Path, default=RESULTS / "deltas.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table and write the JSON."""
    args = parse_arguments(arguments)
    records = measure(args)
    print(table(records))
    used = {"model": args.model.name, "share": args.share}
    packages = ("safetensors", "transformers", "peft")
    write_json(args.output, {**surroundings(packages), "arguments": used, "records": records})


if __name__ == "__main__":
    main()
