"""What the documentation shows of the program: outputs of commands, and tables made from code.

`python tests/documented.py` writes what they are now. In a page a table stands between `<!-- made: NAME -->` and
`<!-- end -->`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "distributed"))

import option_cases
import transformers

from lift_ds import LiftConfig, cli
from lift_ds.config import USUAL_DENSITY
from lift_ds.planner.estimate import Choice, Cluster
from lift_ds.planner.hardware import DEVICES
from lift_ds.planner.models import ModelFacts, build_on_meta, facts_of, read_facts
from lift_ds.planner.plan import Request, make_plan
from lift_ds.planner.presets import PRESETS

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"

#: An indented `$ lift-ds ...` and the indented lines below it.
_SHOWN = re.compile(r"^    \$ lift-ds (?P<command>.*)\n(?:(?:    .*|)\n)*?(?=\S|\Z)", re.MULTILINE)


_MADE = re.compile(r"(?P<begin><!-- made: (?P<name>\w+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)


def refreshed(text: str) -> str:
    """Return a page with the output of each of its `lift-ds` commands, and with each table, as they are now."""
    text = _SHOWN.sub(lambda shown: f"    $ lift-ds {shown['command']}\n{_output(shown['command'])}\n", text)
    return _MADE.sub(lambda made: f"{made['begin']}{TABLES[made['name']]()}{made['end']}", text)


def shares() -> str:
    """The share that `budget_rank` 128 trains of models of each size, and the rank nearest to the usual density."""
    config = LiftConfig(budget_rank=128)
    small = transformers.LlamaConfig(  # of the published config.json of SmolLM2-135M
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, tie_word_embeddings=True,
    )  # fmt: skip
    models = {"SmolLM2-135M": facts_of("", small, build_on_meta(small, config))}
    models |= {preset.hub_name.split("/")[-1]: read_facts(size, config) for size, preset in PRESETS.items()}
    lines = ["| model | trained by `budget_rank` 128 | `budget_rank` nearest to 5% |", "|---|---|---|"]
    for name, facts in models.items():
        share = sum(facts.entries.values()) / facts.managed
        lines.append(f"| {name} | {share:.1%} | {_nearest_rank(facts)} |")
    return "\n".join(lines) + "\n"


def _nearest_rank(facts: ModelFacts) -> int:
    return round(USUAL_DENSITY * facts.managed / sum(map(sum, facts.shapes.values())))


#: Column of the table of memory -> the categories of footprint.json in it.
_FOOTPRINT = {
    "weights": ("weights",), "trained": ("trained apart",), "gradients": ("gradients",), "index": ("index",),
    "master and moments": ("master", "moments"),
}  # fmt: skip


def footprint() -> str:
    """What a rank of four was counted to hold and send, from benchmarks/results/footprint.json."""
    records = json.loads((RESULTS / "footprint.json").read_text())["records"]
    lines = [f"| | {' | '.join(_FOOTPRINT)} | in all | peak of a step | network, a step |", "|---" * 9 + "|"]
    for record in records:
        if record["ranks"] == 4 and record["stage"] in (2, 3):
            held = [sum(record["persistent"][name]["counted"] for name in names) for names in _FOOTPRINT.values()]
            cells = [f"{size:.3f}".rstrip("0").rstrip(".") if size > 5e-4 else "" for size in held]
            totals = [f"{record[key]:.2f}" for key in ("persistent_total", "peak", "network_total")]
            lines.append(f"| {_run_name(record)} | {' | '.join(cells + totals)} |")
    return "\n".join(lines) + "\n"


def _run_name(record: dict[str, Any]) -> str:
    method, _, replicated = record["method"].partition("-")
    placement = f", index {replicated or 'sharded'}" if method == "lift" and record["stage"] == 2 else ""
    return f"{ {'full': 'full', 'lora': 'LoRA', 'lift': 'LIFT'}[method] }, ZeRO-{record['stage']}{placement}"


def deltas() -> str:
    """Size, time and exactness of deltas, from benchmarks/results/deltas.json."""
    lines = ["| dtype | change | format | MB | export, s | apply, s | entries off | logits off |", "|---" * 8 + "|"]
    for record in json.loads((RESULTS / "deltas.json").read_text())["records"]:
        size, export = f"{record['bytes'] / 1e6:.1f}", f"{record['export_seconds']:.1f}"
        apply = f"{record['apply_seconds']:.1f}" if "apply_seconds" in record else ""
        logits = "" if record["logits_off"] is None else f"{record['logits_off']:.2g}"
        cells = (size, export, apply, f"{record['entries_off']:,}", logits)
        lines.append(f"| {record['dtype']} | {record['change']} | `{record['format']}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def settings() -> str:
    """Every setting of LIFT with its default and its meaning, as `LiftConfig` has them."""
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for setting in dataclasses.fields(LiftConfig):
        default = "" if setting.default is None else f"`{json.dumps(setting.default)}`"
        meaning = f"{setting.metadata['help']}. {setting.metadata['more']}".strip()
        lines.append(f"| `{setting.name}` | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def nodes() -> str:
    """Large models on several nodes of 8 x H100 in ZeRO-3, one sequence a rank, as `lift-ds plan` finds it."""
    lines = ["| model | nodes | method | peak, GB | between nodes, GB a GPU | step, s |", "|---|---|---|---|---|---|"]
    config = LiftConfig(density=USUAL_DENSITY)
    for size in ("32B", "70B"):
        facts = read_facts(size, config)
        for count in (2, 4, 16):
            cluster = Cluster(count, 8, DEVICES["h100"], 1000.0)
            request = Request(batch=8 * count, sequence=2048, stages=(3,), offload=False)
            for row in make_plan(facts, config, cluster, request).rows:
                fits = "" if row.fits else ", does not fit"
                cells = f"{row.peak / 1e9:.1f}{fits} | {row.between_nodes / 1e9:.1f} | {row.time.total:.2f}"
                lines.append(f"| {size} | {count} | {_placed(row.choice)} | {cells} |")
    return "\n".join(lines) + "\n"


def _placed(choice: Choice) -> str:
    names = {"full": "full", "lora": "LoRA", "lift": "LIFT"}
    return names[choice.method] + ", frozen weights within nodes" * bool(choice.copy_ranks)


#: Name of a table -> what makes it.
TABLES: dict[str, Callable[[], str]] = {
    "deltas": deltas,
    "footprint": footprint,
    "nodes": nodes,
    "options": option_cases.table,
    "settings": settings,
    "shares": shares,
}


def _output(command: str) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = cli.main(shlex.split(command))
    assert code == 0, command
    return "".join(f"    {line}".rstrip() + "\n" for line in said.getvalue().splitlines())


def pages() -> list[Path]:
    """Return the pages that show such output or tables."""
    texts = {page: page.read_text() for page in (DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md")))}
    return [page for page, text in texts.items() if _SHOWN.search(text) or _MADE.search(text)]


if __name__ == "__main__":
    for page in pages():
        page.write_text(refreshed(page.read_text()))
