"""How a refresh spreads over ranks: wall time on one and on several, the work of each rank, the weights it receives.

    python -m benchmarks.refresh_ranks                  # ZeRO-2 and 3 on 1 and 2 ranks, and the shares on 4

Ranks have one thread each on the same machine, as real ones have one device each, so it needs as many idle cores as
ranks; runs of one and more ranks alternate, and medians are compared. Processor time, of the step and its refresh, is
given beside: what else runs on the machine stretches it less. Beyond the machine's cores only shares and bytes
are reported, no times. Exit code 1 when a budget is exceeded.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import lift_ds
from benchmarks.measure.counting import Ledger, allocated_peak
from benchmarks.measure.models import ds_config
from benchmarks.measure.ranks import run_on_ranks
from benchmarks.measure.records import RESULTS, Record, exit_code, judged, print_budgets, write_results
from lift_ds.model.weights import PrincipalWeight
from lift_ds.refresh.store import NewIndex
from lift_ds.selection import selection_cost
from lift_ds.selection.memory import carry_memory

#: Wall time on two ranks against one; weight bytes a rank receives against an N-th of the model.
TIME_BUDGET, BYTES_BUDGET = 0.55, 1.2


@dataclass(frozen=True)
class Case:
    """One run: `refreshes` are timed after a first one, and two more are counted: what is sent, and what is held."""

    stage: int
    ranks: int
    matrices: int
    rows: int
    columns: int
    lra_rank: int
    budget_rank: int
    refreshes: int


class Chain(nn.Module):
    """Linear layers one after the other, [rows, columns] and [columns, rows] in turn."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        sides = [case.columns if layer % 2 == 0 else case.rows for layer in range(case.matrices + 1)]
        self.layers = nn.ModuleList(nn.Linear(n, m, bias=False) for n, m in pairwise(sides))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = nn.functional.silu(layer(x))
        return x.float().square().mean()


def run(case: Case) -> Record:
    """Train a few steps, each with a refresh, on this rank."""
    torch.manual_seed(1)
    zero = {"stage3_param_persistence_threshold": 0} if case.stage == 3 else {}
    block = {"budget_rank": case.budget_rank, "lra_rank": case.lra_rank, "refresh_interval": 1, "solver": "auto"}
    config = {**ds_config(case.stage, 1, 10**6, clipping=0.0, **zero), "lift": block}
    engine = lift_ds.initialize(model=Chain(case).to(torch.bfloat16), config=config)[0]
    cpu_seconds = [_step(engine, case) for _ in range(1 + case.refreshes)]
    with Ledger(case.ranks) as ledger, ledger.window() as window:
        _step(engine, case)
    carry_bytes = _carry_bytes(engine, case)
    driver = engine.optimizer.driver
    costs = {
        name: selection_cost(*_shape(case, layer), case.lra_rank, driver.plan.settings[name].solver)
        for layer, name in enumerate(driver.attachment.weights)
    }
    own = driver.plan.jobs_of(dist.get_rank())
    return {
        "seconds": [report.seconds for report in driver.reports[1:-2]],
        "selection_seconds": [report.selection_seconds[dist.get_rank()] for report in driver.reports[1:-2]],
        "cpu_seconds": cpu_seconds[1:],
        "churn": driver.reports[-1].churn,
        "matrices": len(own),
        "work": sum(costs[name] for name in own) / sum(costs.values()),
        "one_matrix": max(costs.values()) / sum(costs.values()),
        "weight_bytes_received": window.received["gather"],
        "carry_bytes": carry_bytes,
        "model_bytes": 2 * case.matrices * case.rows * case.columns,
    }


def _shape(case: Case, layer: int) -> tuple[int, int]:
    return (case.rows, case.columns) if layer % 2 == 0 else (case.columns, case.rows)


def _step(engine: Any, case: Case) -> float:
    """One optimizer step and its refresh; returns the processor time of this rank it took."""
    engine.backward(engine(torch.randn(8, case.columns, dtype=torch.bfloat16)))
    start = time.process_time()
    engine.step()
    return time.process_time() - start


def _carry_bytes(engine: Any, case: Case) -> float:
    """Return the most bytes an entry that this rank holds while the states of a turn are carried over in a refresh."""
    store, found = engine.optimizer.driver.store, []
    carry = store.carry

    def measured(new: Sequence[tuple[PrincipalWeight, Sequence[NewIndex]]]) -> int:
        replaced: list[int] = []
        peak = allocated_peak(lambda: replaced.append(carry(new)))
        indices = [one for _, selections in new for one in selections]
        waiting = sum(one.words.nbytes + (0 if one.current is None else one.current.nbytes) for one in indices)
        found.append((peak + waiting) / new[0][0].entries())
        return replaced[0]

    store.carry = measured
    _step(engine, case)
    del store.carry
    return max(found)


def summarise(case: Case, runs: list[list[Record]]) -> Record:
    """Put the repeated runs of one case together.

    Args:
        case: the case.
        runs: of each run what the ranks returned.
    """
    per_rank = [[run[rank] for run in runs] for rank in range(case.ranks)]
    # A refresh takes as long as on the rank that is done last.
    seconds = [max(times) for run in runs for times in zip(*(rank["seconds"] for rank in run), strict=True)]
    return {
        **asdict(case),
        "seconds": {"median": statistics.median(seconds), "all": seconds},
        "selection_seconds": _medians(per_rank, "selection_seconds"),
        "cpu_seconds": _medians(per_rank, "cpu_seconds"),
        "matrices_of_rank": [rank[0]["matrices"] for rank in per_rank],
        "work_of_rank": [rank[0]["work"] for rank in per_rank],
        "one_matrix": per_rank[0][0]["one_matrix"],
        "weights_received": [rank[0]["weight_bytes_received"] / rank[0]["model_bytes"] for rank in per_rank],
        "carry_bytes": max(rank[0]["carry_bytes"] for rank in per_rank),
        "churn": runs[0][0]["churn"],
    }


def _medians(per_rank: list[list[Record]], key: str) -> list[float]:
    return [statistics.median([second for run in rank for second in run[key]]) for rank in per_rank]


def budgets(records: list[Record], cores: int) -> list[Record]:
    """Judge time on two ranks, the most loaded rank's work, memory, and in ZeRO-3 the weights a rank receives."""
    alone = {record["stage"]: record for record in records if record["ranks"] == 1}
    found: list[Record] = []

    def judge(name: str, record: Record, value: float, limit: float) -> None:
        where = f"ZeRO-{record['stage']}, {record['ranks']} ranks"
        found.append(judged(name, where, value, limit))

    for record in records:
        n, single = record["ranks"], alone.get(record["stage"])
        judge("bytes an entry to carry states", record, record["carry_bytes"], carry_memory(1))
        if n == 1:
            continue
        if single and n == 2 and cores >= 2:
            ratio = record["seconds"]["median"] / single["seconds"]["median"]
            judge(f"seconds <= {TIME_BUDGET} of one rank's", record, ratio, TIME_BUDGET)
            ratio = max(record["cpu_seconds"]) / single["cpu_seconds"][0]
            judge(f"processor time <= {TIME_BUDGET} of it", record, ratio, TIME_BUDGET)
        judge("work <= 1/N + one matrix", record, max(record["work_of_rank"]), 1 / n + record["one_matrix"])
        if record["stage"] == 3:
            judge(f"weights received <= {BYTES_BUDGET}/N", record, max(record["weights_received"]), BYTES_BUDGET / n)
    return found


def table(records: list[Record], cores: int) -> str:
    """Return a row per case: seconds, and of each rank its seconds, share of the work and of the weights received."""

    def each(values: list[float], digits: int) -> str:
        return " ".join(f"{value:.{digits}f}" for value in values)

    rows = [
        f"{'':16}{'refresh, s':>11}  {'selection, s, by rank':24}"
        f"{'processor, s, by rank':24}{'work by rank':24}{'weights received, of the model'}"
    ]
    for record in records:
        timed = record["ranks"] <= cores
        seconds = f"{record['seconds']['median']:.2f}" if timed else "-"
        selection = each(record["selection_seconds"], 2) if timed else "-"
        rows.append(
            f"ZeRO-{record['stage']} {record['ranks']} ranks  {seconds:>11}  {selection:24}"
            f"{each(record['cpu_seconds'], 2):24}{each(record['work_of_rank'], 3):24}"
            f"{each(record['weights_received'], 3)}"
        )
    return "\n".join(rows)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3, help="fresh runs of each case")
    parser.add_argument("--refreshes", type=int, default=2, help="timed refreshes in a run")
    parser.add_argument("--matrices", type=int, default=12)
    parser.add_argument("--rows", type=int, default=768)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--lra_rank", type=int, default=64)
    parser.add_argument("--budget_rank", type=int, default=28, help="about 5%% of the entries by default")
    parser.add_argument("--output", type=Path, default=RESULTS / "refresh_ranks.json")
    return parser.parse_args(arguments)


def schedule(args: argparse.Namespace, cores: int) -> Iterator[Case]:
    """Yield the runs in their order: rank counts alternate; those without times run once, with one refresh."""
    sizes = (args.matrices, args.rows, args.columns, args.lra_rank, args.budget_rank)
    for round_ in range(args.rounds):
        for stage in args.stages:
            for n in args.ranks:
                if n <= cores:
                    yield Case(stage, n, *sizes, args.refreshes)
                elif round_ == 0:
                    yield Case(stage, n, *sizes, 1)


def main(arguments: list[str] | None = None) -> int:
    """Run everything, print the table, write the JSON; 1 when a budget is exceeded."""
    args, cores = parse_arguments(arguments), len(os.sched_getaffinity(0))
    runs: dict[Case, list[list[Record]]] = {}
    for case in schedule(args, cores):
        runs.setdefault(case, []).append(run_on_ranks(run, case.ranks, case))
        seconds = " ".join(f"{second:.2f}" for second in runs[case][-1][0]["seconds"])
        print(f"ZeRO-{case.stage}  {case.ranks} ranks  refreshes of {seconds} s", flush=True)
    records = [summarise(case, of_case) for case, of_case in sorted(runs.items(), key=lambda item: item[0].stage)]
    print(table(records, cores))
    print_budgets(found := budgets(records, cores))
    arguments_used = {**vars(args), "output": args.output.name}
    load = {"load_average": os.getloadavg()}  # other processes on the cores show in the times
    write_results(args.output, {"arguments": arguments_used, **load, "records": records, "budgets": found})
    return exit_code(found)


if __name__ == "__main__":
    sys.exit(main())
