"""Part `step`: a training step of full fine-tuning, LoRA and LIFT on this device, in time and memory.

    copy          bytes a second that the device's memory copies
    phase         the optimizer phase alone, over the matrices of one layer: dense AdamW, LIFT, boolean masks
    layer of ...  one decoder layer of Llama-2-7B's and of 70B's shapes
    7B            a whole model of 7B's shapes, its activations computed again in backward; with as many tokens as LoRA
                  and LIFT have room for when they are kept

Training runs by DeepSpeed on one rank, for which the planner says what memory it takes: in ZeRO-2, the whole model in
ZeRO-3 where full fine-tuning fits into the device then. Full fine-tuning trains the matrices that LIFT manages. The
LoRA has rank 128, LIFT a density of 5%. Each training has a process of its own, so that peaks are its own; small, they
share one.
"""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass

import torch

from benchmarks.gpu_parts import machine
from benchmarks.gpu_parts.cells import Batch, Cell, SkippedError
from benchmarks.measure import optimizer_phase, training_step
from benchmarks.measure.models import llama_config, matrix_shapes
from benchmarks.measure.records import Record, judged
from benchmarks.measure.training_step import METHODS, Case

IMPORTS = (
    "deepspeed",
    "lift_ds.zero.engine",
    "transformers.models.llama.modeling_llama",
    "peft",
    "lift_ds.planner.estimate",
)

#: Goals: milliseconds of dense AdamW over those of LIFT's optimizer phase, at least; a step over that of full
#: fine-tuning; a peak over LoRA's; a peak off the planner's.
PHASE, STEP, PEAK, OFF_PLAN = 5.0, 1.0, 1.0, 0.05

_DENSITY, _LORA_RANK = 0.05, 128
#: Share of the device's memory that a plan may fill; the rest is for CUDA itself and for what lies between blocks.
_USABLE = 0.95
#: Sequences of a step where activations are kept: the most that fit.
_BATCHES = (8, 6, 4, 2, 1)

_LAYER_7B, _WHOLE, _KEPT, _LAYER_70B = _CASES = ("layer of 7B", "7B", "7B, activations kept", "layer of 70B")


@dataclass(frozen=True)
class Sizes:
    """What is run.

    Args:
        cases: name -> the training, by LIFT.
        phases: name -> shapes of the matrices whose optimizer phase is timed.
        rounds: of the optimizer phase.
        copied: bytes.
    """

    cases: dict[str, Case]
    phases: dict[str, list[tuple[int, int]]]
    rounds: int
    copied: int


def _case(hidden: int, intermediate: int, layers: int, vocabulary: int, sequence: int, steps: int) -> Case:
    return Case(
        "lift", "cuda", 1, _DENSITY, hidden, intermediate, layers, vocabulary, 4, sequence, False, steps,
        lora=min(_LORA_RANK, hidden // 8), refresh=True, trained_like=True,
    )  # fmt: skip


def _cases(layer_7b: Case, whole: Case, layer_70b: Case) -> dict[str, Case]:
    return {
        _LAYER_7B: layer_7b,
        _WHOLE: dataclasses.replace(whole, checkpointing=True),
        _KEPT: whole,
        _LAYER_70B: dataclasses.replace(layer_70b, key_value_heads=layer_70b.hidden // 1024 or 1),
    }


def _shapes_70b(hidden: int, key_value: int, intermediate: int) -> list[tuple[int, int]]:
    return [(hidden, hidden)] * 2 + [(key_value, hidden)] * 2 + [(intermediate, hidden)] * 2 + [(hidden, intermediate)]


_FULL = Sizes(
    cases=_cases(
        layer_7b=_case(4096, 11008, 1, 1024, 2048, 10),
        whole=_case(4096, 11008, 32, 32000, 2048, 5),
        layer_70b=_case(8192, 28672, 1, 1024, 2048, 8),
    ),
    phases={_LAYER_7B: matrix_shapes(4096, 11008), _LAYER_70B: _shapes_70b(8192, 1024, 28672)},
    rounds=15,
    copied=4 * 2**30,
)
_SMALL = Sizes(
    cases=_cases(
        layer_7b=_case(64, 96, 1, 64, 8, 1),
        whole=_case(64, 96, 2, 64, 8, 1),
        layer_70b=_case(128, 160, 1, 64, 8, 1),
    ),
    phases={_LAYER_7B: matrix_shapes(64, 96), _LAYER_70B: _shapes_70b(128, 64, 160)},
    rounds=1,
    copied=2**20,
)


def batches(device: str, small: bool) -> list[Batch]:
    """Return the cells."""
    sizes = _SMALL if small else _FULL
    alone = [Cell("copy", measure_copy, (sizes.copied,))]
    for name, shapes in sizes.phases.items():
        for dtype in ("bfloat16", "float32") if name == _LAYER_7B else ("bfloat16",):
            arguments = (name, shapes, dtype, sizes.rounds)
            alone.append(Cell(_phase(name, dtype), measure_phase, arguments, expected=40.0))
    runs = []
    for name, case in sizes.cases.items():
        methods = METHODS if name != _KEPT else ("lora", "lift")
        seconds = 60.0 if case.layers == 1 else 110.0
        for method in reversed(methods):
            one = dataclasses.replace(case, method=method, device=device, refresh=method == "lift")
            runs.append(Cell(_run(name, method), measure_training, (name, one), seconds, 2.5 * seconds))
    return [Batch(alone), *([Batch(runs, group=True)] if small else [Batch([cell], group=True) for cell in runs])]


def _phase(name: str, dtype: str) -> str:
    return f"phase, {name}, {dtype}"


def _run(name: str, method: str) -> str:
    return f"{name}: {method}"


def measure_copy(device: str, copied: int) -> Record:
    """Copy within the device's memory."""
    return machine.copy_rate(device, copied)


def measure_phase(device: str, name: str, shapes: list[tuple[int, int]], dtype: str, rounds: int) -> Record:
    """Time the optimizer phase over matrices of these shapes."""
    return optimizer_phase.measure(name, shapes, _DENSITY, getattr(torch, dtype), device, rounds)


def measure_training(device: str, name: str, case: Case) -> Record:
    """Train some steps, with the plan of it beside; a process group is ready.

    Args:
        device: "cuda" or "cpu".
        name: of the kind of case, which decides about stage and batch.
        case: of one method.
    """
    memory = machine.total_memory(device)
    if name == _WHOLE:
        full = dataclasses.replace(case, method="full", stage=3)
        case = dataclasses.replace(case, stage=3 if _fits(full, memory) else 2)
    if name == _KEPT:
        fitting = [batch for batch in _BATCHES if all(_fits(one, memory) for one in _with_batch(case, batch))]
        if not fitting:
            raise SkippedError("does not fit with a single sequence, by its plan")
        case = dataclasses.replace(case, batch=fitting[0])
    planned = plan(case)
    if not _fits(case, memory):
        raise SkippedError(
            f"does not fit: planned {planned['peak_bytes'] / 1e9:.1f} GB, there are {(memory or 0) / 1e9:.1f}"
        )
    try:
        found = training_step.measure(case)
    except torch.OutOfMemoryError as error:
        if case.method != "full":  # the others were planned to fit
            raise
        raise SkippedError(f"does not fit: {str(error).splitlines()[0]}") from error
    except ImportError as error:
        if case.method != "lora":
            raise
        raise SkippedError(f"{error.name} is not installed") from error
    return {"case": dataclasses.asdict(case), "planned": planned, **found}


def _with_batch(case: Case, batch: int) -> list[Case]:
    return [dataclasses.replace(case, batch=batch, method=method) for method in ("lora", "lift")]


def _fits(case: Case, memory: int | None) -> bool:
    return memory is None or plan(case)["peak_bytes"] <= _USABLE * memory


def plan(case: Case) -> Record:
    """Return what the planner says of a case on one GPU: bytes between steps and at the peak, and when that is."""
    import lift_ds
    from lift_ds.planner import formulas, peak
    from lift_ds.planner.estimate import Choice, activations_for, setting_for
    from lift_ds.planner.models import build_on_meta, facts_of
    from lift_ds.planner.refresh_work import refresh_work

    rank = case.lora_rank()
    budget = {"budget_rank": rank} if case.method == "lora" else {"density": case.density}
    config = lift_ds.LiftConfig(lra_rank=rank, **budget)
    settings = llama_config(
        case.hidden, case.intermediate, case.layers, case.vocabulary, case.sequence, case.key_value_heads
    )
    facts = facts_of("a Llama", settings, build_on_meta(settings, config))
    choice = Choice(
        case.method, case.stage, micro_batch=case.batch, sequence=case.sequence, checkpointing=case.checkpointing
    )
    setting = setting_for(facts, config, choice, 1, device_type=case.device, matrices_alone=True)
    held = formulas.persistent(setting)
    moment, size = peak.peak(setting, activations_for(facts, choice))
    found = {"held_bytes": sum(held.values()) - held[formulas.GRADIENTS], "peak_bytes": size, "moment": moment}
    if case.method == "lift":
        refresh = sum(held.values()) + refresh_work(facts, config, 1, case.stage).memory
        found["refresh_peak_bytes"] = max(size, refresh)
    return found


def conclude(cells: dict[str, Record]) -> Record:
    """Return what LIFT's steps take against the others', and the share of the memory's rate that its phase reaches."""
    found: Record = {"lift_over": {}, "share_of_copy_rate": {}}
    for name in _CASES:
        runs = _runs(cells, name)
        if "lift" in runs:
            lift = runs["lift"]["seconds_of_step"]
            found["lift_over"][name] = {method: lift / run["seconds_of_step"] for method, run in runs.items()}
    rate = cells.get("copy", {}).get("bytes_per_second")
    for name, entry in cells.items():
        if "lift_against" in entry and rate:
            moved = entry["bytes"] / (entry["milliseconds"]["lift"] / 1e3)
            found["share_of_copy_rate"][name] = moved / rate
    return found


def _runs(cells: dict[str, Record], name: str) -> dict[str, Record]:
    """Return method -> what was measured of a case, with the median of its steps."""
    entries = {method: cells.get(_run(name, method), {}) for method in METHODS}
    return {
        method: {**entry, "seconds_of_step": statistics.median(entry["seconds_of_steps"])}
        for method, entry in entries.items()
        if "seconds_of_steps" in entry
    }


def report(cells: dict[str, Record], *, measured: bool) -> str:
    """Return a line per optimizer phase and per training."""
    rows = []
    if "bytes_per_second" in cells.get("copy", {}):
        rows.append(f"copying reads and writes {cells['copy']['bytes_per_second'] / 1e9:.0f} GB/s")
    shares = conclude(cells)["share_of_copy_rate"]
    for name, entry in cells.items():
        if "lift_against" in entry:
            ms = entry["milliseconds"]
            times = "  ".join(f"{method} {ms[method]:.3f}" for method in optimizer_phase.METHODS)
            rows.append(f"{name:32} {times} ms; LIFT moves {entry['bytes'] / 1e6:.0f} MB, {shares.get(name, 0):.0%}")
    for name in _CASES:
        for method, run in _runs(cells, name).items():
            rows.append(_training_row(name, method, run))
    rows += [f"{name}: {entry['reason']}" for name, entry in cells.items() if "reason" in entry]
    return "\n".join(rows)


def _training_row(name: str, method: str, run: Record) -> str:
    case, planned, refresh = run["case"], run["planned"], run["refresh"]
    phases = " + ".join(f"{1e3 * part:.1f}" for part in run["phases"])
    again = ""
    if refresh:
        peaks = f"{_gigabytes(refresh['peak_bytes'])}, planned {_gigabytes(planned['refresh_peak_bytes'])}"
        again = f"; refresh {refresh['seconds']:.2f} s, peak with it {peaks}"
    return (
        f"{name:22} {method:5} ZeRO-{case['stage']}, {case['batch']} x {case['sequence']} tokens: "
        f"{1e3 * run['seconds_of_step']:8.1f} ms ({phases}); peak {_gigabytes(run['peak_bytes'])} GB, "
        f"planned {_gigabytes(planned['peak_bytes'])}{again}"
    )


def _gigabytes(size: float | None) -> str:
    return "-" if size is None else f"{size / 1e9:.2f}"


def budgets(cells: dict[str, Record]) -> list[Record]:
    """Judge the optimizer phase, the step, and peaks against LoRA's and the planner's."""
    found = []
    for name, entry in cells.items():
        if "lift_against" in entry and entry["dtype"] == "bfloat16":
            found.append(
                judged("dense over LIFT, at least", name, 1 / entry["lift_against"]["dense"], PHASE, least=True)
            )
    for name in _CASES:
        runs = _runs(cells, name)
        if {"lift", "full"} <= runs.keys():
            ratio = runs["lift"]["seconds_of_step"] / runs["full"]["seconds_of_step"]
            found.append(judged("step over full fine-tuning's, at most", name, ratio, STEP))
        if {"lift", "lora"} <= runs.keys() and name in (_WHOLE, _KEPT):
            ratio = runs["lift"]["peak_bytes"] / runs["lora"]["peak_bytes"]
            found.append(judged("peak over LoRA's, at most", name, ratio, PEAK))
        for method, run in runs.items():
            off = abs(run["peak_bytes"] / run["planned"]["peak_bytes"] - 1)
            found.append(judged("peak off the planner's, at most", _run(name, method), off, OFF_PLAN))
    return found
