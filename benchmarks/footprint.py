"""Memory and network of full fine-tuning, LoRA and LIFT on ZeRO 0 to 3: counted, beside what formulas say.

    python -m benchmarks.footprint                      # every method, stage and 1, 2, 4 ranks; about ten minutes
    python -m benchmarks.footprint --stages 2 --ranks 2
    python -m benchmarks.footprint --methods lift --experts 8 --output benchmarks/results/footprint_experts.json
    python -m benchmarks.footprint --checkpointing --vocabulary 2048 --ranks 1,2,4 --stages 1,2,3 \\
        --output benchmarks/results/footprint_checkpointing.json

All methods train the same matrices of a small Llama in bf16 (embeddings, norms and head are frozen, and listed apart);
LoRA and LIFT train equally many numbers. Figures are bytes per parameter of the managed matrices and rank. Every
configuration runs in fresh processes, and is counted in its third step (ZeRO-3 records the order of its fetches in the
first two); a fourth step of LIFT has a refresh. Exit code 1 when a count is off its formula or a budget is exceeded.

The peak is one without activation checkpointing, where activations are most of it. LoRA keeps r numbers per token and
matrix more, LIFT its index: LIFT's peak is the lower one from about (m + n)/N tokens per rank and step on. With
activation checkpointing (ZeRO-2, two ranks, as many tokens) LIFT's came out 1% above LoRA's, by the index.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lift_ds
from benchmarks.measure.counting import Ledger, Window, bytes_by_category, walk_storages
from benchmarks.measure.holdings import categories
from benchmarks.measure.models import build_llama, dense_engine, ds_config, llama_config, lora_rank, step
from benchmarks.measure.ranks import run_on_ranks
from benchmarks.measure.records import RESULTS, Record, exit_code, judged, print_budgets, write_results
from lift_ds.planner import formulas
from lift_ds.planner.estimate import Choice, activations_for, setting_for
from lift_ds.planner.formulas import CATEGORIES, GRADIENTS, INDEX, MASTER, MOMENTS, OTHER
from lift_ds.planner.models import build_on_meta, facts_of
from lift_ds.planner.peak import Activations, peak

METHODS = ("full", "lora", "lift", "lift-replicated")
#: Kinds of collectives in the order of the table.
KINDS = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "gather")

#: By which a refresh carries the states of training over to a new index.
_CARRYING = ("all_reduce", "all_gather", "all_to_all")

#: A count may be off its formula by this share; where the formula has nothing, by these bytes per managed parameter
#: (scalars such as step counts, norms and the token batch).
TOLERANCE, NOTHING = 0.02, 0.005
#: A peak may be off by this share: it is the largest of several moments, each a sum of many tensors.
PEAK_TOLERANCE = 0.05

#: Steps before the one that is counted.
_WARM_UP = 2


@dataclass(frozen=True)
class Case:
    """One configuration; the sizes are those of the model, `rank` of the LoRA, and the budget rank of LIFT."""

    method: str
    stage: int
    ranks: int
    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    rank: int
    batch: int
    sequence: int
    checkpointing: bool = False
    live: int = 0
    experts: int = 0

    def __str__(self) -> str:
        return f"{self.method:15} ZeRO-{self.stage}  {self.ranks} rank{'s' if self.ranks > 1 else ' '}"


def build_engine(case: Case) -> Any:
    """Build the engine of a method."""
    model: Any = build_llama(
        case.hidden, case.intermediate, case.layers, case.vocabulary, case.sequence, experts=case.experts
    )
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    # Buckets follow the width, and ZeRO-3 lets go of a layer after its use.
    config = ds_config(case.stage, case.batch, case.hidden**2, clipping=0.0, live=case.live)
    if case.method.startswith("lift"):
        return lift_ds.initialize(model=model, config={**config, "lift": lift_block(case)})[0]
    return dense_engine(model, case.method, case.rank, config)


def lift_block(case: Case) -> Record:
    """Return LIFT's settings of a case."""
    return {
        "budget_rank": case.rank,
        "lra_rank": case.rank,
        "refresh_interval": _WARM_UP + 2,
        "index_placement": "replicated" if case.method == "lift-replicated" else "sharded",
    }


def count(case: Case) -> Record:
    """Train a few steps on this rank and count; runs on every rank of the case."""
    with Ledger(case.ranks) as ledger:
        engine = build_engine(case)
        for _ in range(_WARM_UP):
            _step(engine, case, ledger)
        window, held = _step(engine, case, ledger)
        between = _holdings(engine, ledger)
        walked = sum(storage.nbytes() for storage in walk_storages())
        found: Record = {
            "persistent": between | {GRADIENTS: held[GRADIENTS]},
            "start": window.start_bytes, "unseen_by_walk": ledger.live_bytes - walked, "step": _as_json(window),
        }  # fmt: skip
        if case.method.startswith("lift"):
            found["refresh"] = _as_json(_step(engine, case, ledger)[0])
    return found


def _step(engine: Any, case: Case, ledger: Ledger) -> tuple[Window, dict[str, int]]:
    """One optimizer step; returns what was counted, and what was held between backward and step by category."""
    held: dict[str, int] = {}

    def entering(phase: str) -> None:
        if phase == "step":
            held.update(_holdings(engine, ledger))
        ledger.phase = phase

    with ledger.window() as window:
        step(engine, torch.randint(0, case.vocabulary, (case.batch, case.sequence)), entering)
    return window, held


def _holdings(engine: Any, ledger: Ledger) -> dict[str, int]:
    return bytes_by_category([*walk_storages(), *ledger.live_storages()], categories(engine), OTHER)


def _as_json(window: Window) -> Record:
    return {
        "peak": window.peak_bytes,
        "peak_by_phase": window.peak_by_phase,
        "peak_origins": window.largest_origins(),
        "logical": window.logical,
        "received": window.received,
        "calls": window.calls,
    }


def planned(case: Case) -> tuple[formulas.Setting, Activations]:
    """Return what the formulas need to know about a case, and those of its peak."""
    config = lift_ds.LiftConfig.from_dict(lift_block(case))
    model = llama_config(
        case.hidden, case.intermediate, case.layers, case.vocabulary, case.sequence, experts=case.experts
    )
    facts = facts_of(str(case), model, build_on_meta(model, config))
    choice = Choice(
        case.method.removesuffix("-replicated"), case.stage,
        micro_batch=case.batch, sequence=case.sequence, checkpointing=case.checkpointing,
    )  # fmt: skip
    setting = setting_for(facts, config, choice, case.ranks, device_type="cpu", matrices_alone=True)
    return dataclasses.replace(setting, bucket=case.hidden**2, live=case.live), activations_for(facts, choice)


def summarise(case: Case, found: list[Record]) -> Record:
    """Turn the counts of all ranks into bytes per managed parameter, each beside its formula.

    Args:
        case: the configuration.
        found: what `count` returned on each rank; memory is that of the rank that holds most.
    """
    setting, work = planned(case)
    peak_moment, peak_bytes = peak(setting, work)
    managed = setting.managed

    def worst(*path: str) -> float:
        values = []
        for rank in found:
            value: Any = rank
            for key in path:
                value = value.get(key, 0)
            values.append(value)
        return max(values) / managed

    def beside(counted: dict[str, float], formula: dict[str, float]) -> Record:
        return {
            key: {"counted": counted.get(key, 0.0), "formula": formula.get(key, 0.0) / managed}
            for key in sorted(counted.keys() | formula.keys())
        }

    def kinds(part: str, figure: str) -> dict[str, float]:
        return {kind: worst(part, figure, kind) for kind in found[0][part][figure]}

    memory = {category: worst("persistent", category) for category in CATEGORIES}
    record: Record = {
        **dataclasses.asdict(case),
        "density": setting.total_trained / managed,
        "managed_parameters": managed,
        "persistent": beside(memory, formulas.persistent(setting)),
        "persistent_total": sum(memory.values()),
        "unseen_by_walk": worst("unseen_by_walk"),
        "transient_peak": worst("step", "peak"),
        "peak": max((rank["start"] + rank["step"]["peak"]) / managed for rank in found),
        "peak_formula": peak_bytes / managed,
        "peak_moment": peak_moment,
        "peak_origins": {origin: size / managed for origin, size in found[0]["step"]["peak_origins"].items()},
        "network": beside(kinds("step", "logical"), formulas.network_step(setting)),
        "network_received": {
            kind: sum(rank["step"]["received"].get(kind, 0) for rank in found) / len(found) / managed
            for kind in found[0]["step"]["received"]
        },
        "network_calls": found[0]["step"]["calls"],
    }
    record["network_total"] = sum(entry["counted"] for entry in record["network"].values())
    record["network_received_total"] = sum(record["network_received"].values())
    if "refresh" in found[0]:
        both = {kind: worst("refresh", "logical", kind) for kind in found[0]["refresh"]["logical"]}
        extra = {kind: size - worst("step", "logical", kind) for kind, size in both.items()}
        record["refresh_network"] = beside(extra, formulas.network_refresh(setting))
        record["refresh_network_total"] = sum(extra.values())
        # Beside the new index and the weights, which owners gather and broadcast.
        received = {kind: worst("refresh", "received", kind) - worst("step", "received", kind) for kind in _CARRYING}
        record["refresh_carried"] = sum(received.values())
        record["refresh_transient_peak"] = worst("refresh", "peak")
    return record


def deviations(record: Record) -> list[str]:
    """Return a line for every count of a record that is off its formula."""
    lines = []
    where = f"{record['method']} ZeRO-{record['stage']} {record['ranks']} ranks"
    for part in ("persistent", "network", "refresh_network"):
        for key, entry in record.get(part, {}).items():
            allowed = max(TOLERANCE * entry["formula"], NOTHING if entry["formula"] < NOTHING else 0.0)
            if abs(entry["counted"] - entry["formula"]) > allowed:
                lines.append(f"{where}, {part} {key}: counted {entry['counted']:.4f}, formula {entry['formula']:.4f}")
    if abs(record["peak"] - record["peak_formula"]) > PEAK_TOLERANCE * record["peak_formula"]:
        lines.append(f"{where}, peak: counted {record['peak']:.4f}, formula {record['peak_formula']:.4f}")
    return lines


def budgets(records: list[Record]) -> list[Record]:
    """Judge the budgets that the measured configurations allow to judge.

    They are stated for a density of 5%; above that they scale with it.
    """
    by_case = {(r["method"], r["stage"], r["ranks"]): r for r in records}
    found: list[Record] = []

    def judge(name: str, record: Record, value: float, limit: float) -> None:
        where = f"ZeRO-{record['stage']}, {record['ranks']} ranks, {record['method']}"
        found.append(judged(name, where, value, limit))

    for (method, stage, n), lift in by_case.items():
        if not method.startswith("lift"):
            continue
        scale = max(1.0, lift["density"] / 0.05)
        counted = {category: entry["counted"] for category, entry in lift["persistent"].items()}
        full, lora = by_case.get(("full", stage, n)), by_case.get(("lora", stage, n))
        if stage == 3 or (stage in (1, 2) and method == "lift"):
            judge("index <= 0.12/N", lift, counted[INDEX], 0.12 / n * scale)
        if stage > 0:
            judge("master and moments <= 0.6/N", lift, counted[MASTER] + counted[MOMENTS], 0.6 / n * scale)
        if full and n > 1 and stage > 0:
            share = lift["network_total"] / full["network_total"]
            if stage == 3:
                if not lift["checkpointing"]:  # which fetches the weights once more, in all methods
                    judge("network <= 0.75 of full", lift, share, 0.75)
            elif method == "lift":
                judge("network <= 1/12 of full", lift, share, scale / 12)
            else:
                judge("network <= 1/18 of full", lift, share, scale / 18)
        if n > 1 and stage > 0:
            judge("states carried in a refresh <= 0.15", lift, lift["refresh_carried"], 0.15 * scale)
        if lora and stage == 2 and n == 4 and method == "lift":
            more = lift["persistent_total"] - lora["persistent_total"]
            judge("persistent within 0.15/N of LoRA", lift, more, 0.15 / n * scale)
            if not lift["checkpointing"]:
                judge("peak of a step below LoRA's", lift, lift["peak"], lora["peak"])
    return found


def table(records: list[Record]) -> str:
    """Return one table: a row per configuration, counted bytes per managed parameter and rank, the formula below."""
    memory = ("weights", "trained", "grads", "index", "master", "moments", "other", "total")
    network = ("all_red", "red_sc", "all_gat", "step", "receive", "refresh")
    head = [f"{'bytes per managed parameter':29}", *(f"{name:>7}" for name in memory)]
    head += [f"{'+peak':>7} {'peak':>7} |", *(f"{name:>7}" for name in network)]
    rows = [" ".join(head)]
    for r in records:
        for figure in ("counted", "formula"):
            name = f"{r['method']:15} ZeRO-{r['stage']} N={r['ranks']}" if figure == "counted" else "   formula"
            held = {key: entry[figure] for key, entry in r["persistent"].items()}
            held[OTHER] += held.pop("unmanaged")
            order = ("weights", "trained apart", GRADIENTS, INDEX, MASTER, MOMENTS, OTHER)
            cells = [held[key] for key in order] + [sum(held.values())]
            sent = {key: entry[figure] for key, entry in r["network"].items()}
            refresh = sum(entry[figure] for entry in r.get("refresh_network", {}).values())
            line = f"{name:29} " + " ".join(f"{value:7.4f}" for value in cells)
            line += f" {r['transient_peak']:7.4f} {r['peak']:7.4f} |" if figure == "counted" else ""
            line += f"{'':8} {r['peak_formula']:7.4f} |" if figure == "formula" else ""
            values = [sent.get(kind, 0.0) for kind in KINDS[:3]] + [sum(sent.values())]
            line += "".join(f" {value:7.4f}" for value in values)
            line += f" {r['network_received_total']:7.4f}" if figure == "counted" else " " * 8
            rows.append((line + (f" {refresh:7.4f}" if refresh else "")).rstrip())
    return "\n".join(rows)


def cases(args: argparse.Namespace) -> list[Case]:
    """Return the configurations asked for; a replicated index is a case of its own where it could be sharded."""
    rank = args.rank or lora_rank(args.density, args.hidden, args.intermediate)
    found = []
    for n, stage, method in itertools.product(args.ranks, args.stages, args.methods):
        if method == "lift-replicated" and (stage not in (1, 2) or n == 1):
            continue
        found.append(
            Case(
                method, stage, n, args.hidden, args.intermediate, args.layers, args.vocabulary, rank, args.batch,
                args.sequence, args.checkpointing, args.live, args.experts,
            )
        )  # fmt: skip
    return found


def _list_of(kind: Callable[[str], Any], allowed: tuple[Any, ...] | None = None) -> Callable[[str], list[Any]]:
    def parse(text: str) -> list[Any]:
        values = [kind(part) for part in text.split(",")]
        for value in values:
            if allowed is not None and value not in allowed:
                raise argparse.ArgumentTypeError(f"{value!r} is not one of {', '.join(map(str, allowed))}")
        return values

    return parse


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", type=_list_of(str, METHODS), default=list(METHODS), help="comma-separated")
    parser.add_argument("--stages", type=_list_of(int, (0, 1, 2, 3)), default=[0, 1, 2, 3])
    parser.add_argument("--ranks", type=_list_of(int), default=[1, 2, 4])
    parser.add_argument("--density", type=float, default=0.05, help="share of the managed matrices that is trained")
    parser.add_argument("--rank", type=int, help="rank of the LoRA and budget rank of LIFT, in place of --density")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=656)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=16)
    parser.add_argument("--batch", type=int, default=2, help="sequences per rank and step")
    parser.add_argument("--sequence", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--checkpointing", action="store_true", help="of activations")
    parser.add_argument("--experts", type=int, default=0, help="of each layer: a Mixtral; with --methods lift alone")
    parser.add_argument("--live", type=int, default=0, help="parameters ZeRO-3 may keep gathered")
    parser.add_argument("--output", type=Path, default=RESULTS / "footprint.json")
    args = parser.parse_args(arguments)
    if args.experts and not all(method.startswith("lift") for method in args.methods):
        parser.error(
            f"--experts {args.experts} needs --methods lift: LoRA and the formulas of the others know no stacks"
        )
    return args


def main(arguments: list[str] | None = None) -> int:
    """Run every configuration, print the table, write the JSON; 1 when a count or a budget is missed."""
    args = parse_arguments(arguments)
    records, off = [], []
    for case in cases(args):
        start = time.perf_counter()
        records.append(summarise(case, run_on_ranks(count, case.ranks, case)))
        off += (lines := deviations(records[-1]))
        state = "; ".join(lines) if lines else "agrees"
        print(f"{case}  {time.perf_counter() - start:5.1f} s  {state}", flush=True)
    print(table(records))
    print_budgets(found := budgets(records))
    for line in off:
        print(f"OFF   {line}")
    write_results(
        args.output,
        {
            "arguments": {**vars(args), "output": args.output.name},
            "units": "bytes per parameter of the managed matrices and rank; network: logical bytes of the collectives",
            "records": records,
            "budgets": found,
            "deviations": off,
        },
    )
    return 1 if off else exit_code(found)


if __name__ == "__main__":
    sys.exit(main())
