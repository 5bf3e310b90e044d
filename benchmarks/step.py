"""What a step of LIFT costs: the optimizer phase by itself, and whole training steps beside full fine-tuning and LoRA.

    python -m benchmarks.step                           # on the host: two threads, then two gloo ranks of ZeRO-2
    python -m benchmarks.step --device cuda             # on one GPU: layers of a 7B model, sequence 2048, checkpointing

Methods alternate, so that what else runs on the machine meets all of them; medians are shown, and ratios are medians
over the rounds. Within the optimizer phase they alternate in one process. A training step needs an engine of DeepSpeed,
which keeps parts of earlier ones alive: there each method runs in fresh processes, one after the other, round by round.
Exit code 1 when a budget is exceeded.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from benchmarks.measure import optimizer_phase, training_step
from benchmarks.measure.models import matrix_shapes
from benchmarks.measure.plots import save_svg
from benchmarks.measure.ranks import run_on_ranks
from benchmarks.measure.records import RESULTS, Record, exit_code, judged, print_budgets, write_results
from benchmarks.measure.training_step import Case

#: LIFT's optimizer phase against a dense one; the published masks' against LIFT's; LIFT's training step against that of
#: full fine-tuning.
DENSE_BUDGET, MASKS_BUDGET, STEP_BUDGET = 1.0, 10.0, 1.0


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; sizes that are not given depend on the device."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--parts", nargs="+", choices=["phase", "training"], default=["phase", "training"])
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--threads", type=int, default=2, help="of the optimizer phase on the host")
    parser.add_argument("--phase_rounds", type=int, default=15)
    parser.add_argument("--phase_width", type=int, nargs=2, default=None, help="hidden and intermediate size")
    parser.add_argument("--rounds", type=int, default=3, help="fresh runs of each method")
    parser.add_argument("--steps", type=int, default=6, help="timed steps in a run")
    parser.add_argument("--ranks", type=int, default=None)
    parser.add_argument("--hidden", type=int, default=None)
    parser.add_argument("--intermediate", type=int, default=None)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=None)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--sequence", type=int, default=None)
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args(arguments)
    on_gpu = args.device == "cuda"
    defaults: Record = {
        "phase_width": (4096, 11008) if on_gpu else (2048, 5504),
        "ranks": 1 if on_gpu else 2,
        "hidden": 4096 if on_gpu else 512,
        "intermediate": 11008 if on_gpu else 1408,
        "vocabulary": 32000 if on_gpu else 2048,
        "sequence": 2048 if on_gpu else 512,
        "checkpointing": on_gpu,
        "output": RESULTS / ("step_cuda.json" if on_gpu else "step.json"),
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def run_phases(args: argparse.Namespace) -> list[Record]:
    """Time the optimizer phase over single matrices and over those of a layer, in float32 and bf16."""
    torch.set_num_threads(args.threads)
    h, i = args.phase_width
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, shapes in [(f"{h} x {h}", [(h, h)]), (f"{h} x {i}", [(h, i)]), ("a layer", matrix_shapes(h, i))]:
            found.append(optimizer_phase.measure(name, shapes, args.density, dtype, args.device, args.phase_rounds))
            print(phase_row(found[-1]), flush=True)
    return found


def phase_row(record: Record) -> str:
    """Return one line: milliseconds of the methods, of LIFT's parts, of the limit, and the ratios."""
    ms, against = record["milliseconds"], record["lift_against"]
    parts = " + ".join(f"{part:.2f}" for part in record["lift_parts"])
    return (
        f"{record['name']:12} {record['dtype']:9} dense {ms['dense']:7.2f}  masks {ms['masks']:7.2f}  "
        f"published {ms['published']:7.2f}  lift {ms['lift']:6.2f} ms ({parts}; memory alone {record['limit']:.2f})  "
        f"lift/dense {against['dense']:.2f}  masks/lift {1 / against['masks']:.1f}  "
        f"published/lift {1 / against['published']:.1f}; fastest rounds: lift/dense "
        f"{record['best']['lift'] / record['best']['dense']:.2f}  "
        f"published/lift {record['best']['published'] / record['best']['lift']:.1f}"
    )


def run_training(args: argparse.Namespace) -> Record:
    """Time training steps of each method, round by round."""
    case = Case(
        "full", args.device, args.ranks, args.density, args.hidden, args.intermediate, args.layers, args.vocabulary,
        args.batch, args.sequence, args.checkpointing, args.steps,
    )  # fmt: skip
    runs = []
    for _ in range(args.rounds):
        runs.append(
            [
                run_on_ranks(training_step.measure, one.ranks, one, device=one.device, limit=900)
                for one in training_step.cases_of(case)
            ]
        )
        print(training_rows(training_step.summarise(case, runs[-1:])), flush=True)
    return training_step.summarise(case, runs)


def training_rows(record: Record) -> str:
    """Return a line per method: seconds of a step, of its parts, and what is trained."""
    rows = []
    for method, found in record["methods"].items():
        forward, backward, step = found["forward_backward_step"]
        peak = f"  peak {found['peak_bytes'] / 2**30:.2f} GiB" if found["peak_bytes"] else ""
        rows.append(
            f"{method:5} {found['seconds']:.4f} s a step (forward {forward:.4f}, backward {backward:.4f}, "
            f"step {step:.4f}; processor {found['processor']:.4f})  trains {found['trained']:,}{peak}  "
            f"lift takes {record['lift_against'][method]:.3f} of it"
        )
    return "\n".join(rows)


def budgets(phases: list[Record], training: Record | None) -> list[Record]:
    """Judge every case of the optimizer phase, and the training step."""
    found: list[Record] = []

    def judge(name: str, where: str, value: float, limit: float) -> None:
        found.append(judged(name, where, value, limit))

    for record in phases:
        where, against = f"{record['name']}, {record['dtype']}", record["lift_against"]
        judge("lift <= dense", where, against["dense"], DENSE_BUDGET)
        judge(f"lift <= 1/{MASKS_BUDGET:.0f} of published", where, against["published"], 1 / MASKS_BUDGET)
    if training is not None:
        judge("training step <= full", f"{training['ranks']} ranks", training["lift_against"]["full"], STEP_BUDGET)
    return found


def plot(path: Path, phases: list[Record], training: Record | None) -> None:
    """Draw what was measured: milliseconds of the optimizer phase by case, seconds of a training step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    for offset, method in enumerate(("published", "masks", "dense", "lift")):
        places = [place + 0.2 * (offset - 1.5) for place in range(len(phases))]
        left.bar(places, [record["milliseconds"][method] for record in phases], 0.18, label=method)
    left.set_xticks(range(len(phases)), [f"{record['name']}\n{record['dtype']}" for record in phases])
    left.set(yscale="log", ylabel="ms", title="optimizer phase")
    left.legend()
    if training is not None:
        bottom = [0.0] * len(training["methods"])
        for which, part in enumerate(("forward", "backward", "step")):
            heights = [found["forward_backward_step"][which] for found in training["methods"].values()]
            right.bar(list(training["methods"]), heights, bottom=bottom, label=part)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        right.set(ylabel="s", title=f"training step, {training['ranks']} rank(s), ZeRO-{training['stage']}")
        right.legend()
    save_svg(figure, path)


def main(arguments: list[str] | None = None) -> int:
    """Run the parts, print the table, write JSON and plot; 1 when a budget is exceeded."""
    args = parse_arguments(arguments)
    phases = run_phases(args) if "phase" in args.parts else []
    training = run_training(args) if "training" in args.parts else None
    print("\n".join(map(phase_row, phases)))
    if training is not None:
        print(training_rows(training))
    print_budgets(found := budgets(phases, training))
    results = {
        "arguments": {**vars(args), "output": args.output.name},
        "gpu": torch.cuda.get_device_name() if args.device == "cuda" else None,
        "load_average": os.getloadavg(),  # other processes on the cores show in the times
        "phases": phases,
        "training": training,
        "budgets": found,
    }
    write_results(args.output, results)
    plot(args.output.with_suffix(".svg"), phases, training)
    return exit_code(found)


if __name__ == "__main__":
    sys.exit(main())
