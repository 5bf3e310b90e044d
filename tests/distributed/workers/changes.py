"""What training has changed, on real ranks: copies kept by patches, the weights before it, both after a resume."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import cases
import engines
import torch
import torch.distributed as dist
from torch import Tensor

import lift_ds
from benchmarks.measure.counting import Ledger
from lift_ds.model.attachment import require_attachment
from lift_ds.universal import convert
from lift_ds.zero.partitioned import gathered

#: Refreshes after steps 6, 12 and 18 of 20; the checkpoint comes right after the second.
SETTINGS = lift_ds.LiftConfig(
    density=0.1, lra_rank=4, refresh_interval=6, solver="gram", lr=1e-2, extra_trainable=("norm.weight",),
    keep_base=True, track_changes=True,
)  # fmt: skip
STEPS, CUT = 20, 12

Weights = dict[str, Tensor]


def engine_of(kind: str, stage: int, settings: lift_ds.LiftConfig = SETTINGS) -> Any:
    """An engine over a fresh model; ZeRO-3 keeps the weights of attention whole between steps, and no others."""
    config = engines.ds_config(stage, bf16=True)
    if stage == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 1500
    return engines.lift_engine(cases.build(kind, torch.bfloat16), config, settings)


def whole(engine: Any, names: list[str]) -> Weights:
    """The parameters of the plain model, whole."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        if name in names:
            with gathered([parameter]):
                found[name] = parameter.detach().clone()
    return found


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def patch(copy: Weights, engine: Any, since: int | None, **options: Any) -> int:
    """Bring a copy up to date; returns the bytes that it took."""
    size = 0
    for name, shape, indices, values in lift_ds.changed_entries(engine, since, **options):
        assert copy[name].shape == shape
        assert values.dtype == copy[name].dtype
        size += values.nbytes + (0 if indices is None else indices.nbytes)
        if indices is None:
            copy[name] = values.view(shape)
            continue
        assert indices.dtype == torch.int32
        assert bool((indices.diff() > 0).all())
        copy[name].view(-1)[indices.long()] = values
    return size


def step_with_reference(engine: Any, kind: str, step: int, base: Weights) -> bool:
    """A step that looks at the model before training between forward and backward, as DPO does."""
    rows = engines.rank_rows()
    loss = cases.loss_of(engine, kind, step, rows)
    with lift_ds.base_weights(engine), torch.no_grad():
        before = cases.loss_of(engine.module, kind, step, rows)
        as_before = same(whole(engine, [*base]), base)
    engine.backward(loss)
    engine.step()
    plain = cases.build(kind, torch.bfloat16)
    plain.load_state_dict(base)
    with torch.no_grad():
        return as_before and torch.equal(before, cases.loss_of(plain, kind, step, rows))


def run(kind: str, stage: int, folder: Path) -> dict[str, Any]:
    """A run that is followed by copies, and the same from its checkpoint on."""
    base = {name: p.detach().clone() for name, p in cases.build(kind, torch.bfloat16).named_parameters()}
    everyones, mains = ({name: p.clone() for name, p in base.items()} for _ in range(2))
    engine = engine_of(kind, stage)
    found: dict[str, Any] = {"equal": [], "main": [], "base": [], "sizes": [], "nothing": []}
    since = 0
    ledger = Ledger(dist.get_world_size())
    for step in range(STEPS):
        if step % 3 == 0:
            found["base"].append(step_with_reference(engine, kind, step, base))
        else:
            engines.train(engine, kind, range(step, step + 1))
        now = whole(engine, [*base])
        if step + 1 in (CUT - 1, CUT):
            with ledger, ledger.window() as window:
                found["sizes"].append(patch(mains, engine, step, on_all_ranks=False))
            found[f"received {step + 1}"] = sum(window.received.values())
        else:
            found["sizes"].append(patch(mains, engine, step, on_all_ranks=False))
        found["main"].append(same(mains, now))
        found["nothing"].append(list(lift_ds.changed_entries(engine, step + 1)))
        if step % 3 == 2 or step == STEPS - 1:  # on a refresh, and on other steps
            patch(everyones, engine, since)
            since = step + 1
            found["equal"].append(same(everyones, now))
        if step + 1 == CUT:
            engine.save_checkpoint(folder, "cut")
    with ledger, ledger.window() as window, lift_ds.base_weights(engine), torch.no_grad():
        pass
    found["collectives"] = dict(window.calls)
    found["refreshes"] = [report.step for report in lift_ds.refreshes(engine.module)]
    found["entries"] = sum(weight.entries() for weight in require_attachment(engine.module).weights.values())
    found["records"] = recorded(engine)
    found["resumed"] = resumed(kind, stage, folder, base, whole(engine, [*base]), found["records"])
    engine.destroy()
    return found


def recorded(engine: Any) -> dict[str, Any]:
    """What this rank has recorded, and how many bytes of index and numbers that takes."""
    changes = require_attachment(engine.module).driver.changes
    records = {"base": changes.base, "left": {name: left.entries for name, left in changes.left.items()}}
    found: dict[str, Any] = {}
    for kind, of_weights in records.items():
        for name, entries in of_weights.items():
            found[f"{name} {kind}"] = (entries.positions(), entries.numbers)
    entries = [entries for of_weights in records.values() for entries in of_weights.values()]
    found["bytes"] = sum(one.index.words.nbytes + one.numbers.nbytes for one in entries)
    found["least"] = sum(4 * one.numbers.numel() + 2 * one.index.layout.rows for one in entries)
    return found


def resumed(
    kind: str, stage: int, folder: Path, base: Weights, end: Weights, records: dict[str, Any]
) -> dict[str, Any]:
    """The same run from its checkpoint on: weights, records and base at the end."""
    engine = engine_of(kind, stage)
    engine.load_checkpoint(folder, "cut")
    with lift_ds.base_weights(engine):
        at_once = same(whole(engine, [*base]), base)
    engines.train(engine, kind, range(CUT, STEPS))
    again = recorded(engine)
    copy = {name: p.clone() for name, p in base.items()}
    patch(copy, engine, None)
    with lift_ds.base_weights(engine):
        base_again = same(whole(engine, [*base]), base)
    ended = same(whole(engine, [*base]), end) and same(copy, end)
    engine.destroy()
    equal = records.keys() == again.keys() and all(
        all(map(torch.equal, records[key], again[key])) for key in records if key not in ("bytes", "least")
    )
    return {"base at once": at_once, "ended": ended, "base": base_again, "records": equal}


def other_stage(folder: Path) -> dict[str, Any]:
    """ZeRO-3 from the universal form of a checkpoint of ZeRO-2, of which each rank takes its part."""
    if dist.get_rank() == 0:
        convert(folder / "cut", folder / "cut_universal")
    dist.barrier()
    base = {name: p.detach().clone() for name, p in cases.build("llama", torch.bfloat16).named_parameters()}
    engine = engine_of("llama", 3, replace(SETTINGS, track_changes=False))
    engine.load_checkpoint(folder, "cut_universal")
    engines.train(engine, "llama", range(CUT, CUT + 1))
    with lift_ds.base_weights(engine):
        as_before = same(whole(engine, [*base]), base)
        refused = engines.message_of(lambda: engine.save_checkpoint(folder, "never"))
    engine.destroy()
    return {"base": as_before, "refused": refused}


if __name__ == "__main__":
    engines.start()
    target = Path(sys.argv[1])
    results = {
        "stage 2": run("llama", 2, target / "2"),
        "stage 3": run("mixtral", 3, target / "3"),
        "other stage": other_stage(target / "2"),
    }
    engines.finish(sys.argv[1], results)
