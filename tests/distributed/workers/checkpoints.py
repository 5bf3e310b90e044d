"""Checkpoints on real ranks: universal ones on other rank counts and stages, interrupted and failed saves, refusals.

checkpoints.py FOLDER JOB...     whole; stages; damages; newest; full=TMPFS; keep=FOLDER; kept=FOLDER; or a piece,
                                 FIRST,LAST,RESUME,SAVE
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import cases
import engines
import torch.distributed as dist

import lift_ds
from lift_ds.universal import convert

#: Refreshes after steps 3 and 6 of 8; two groups, of which one does not decay.
SETTINGS = lift_ds.LiftConfig(
    budget_rank=4,
    lra_rank=4,
    refresh_interval=3,
    solver="chebyshev",
    selection_tolerance=1e-4,
    lr=1e-3,
    weight_decay=0.1,
    extra_trainable=("norm.weight",),
)
STEPS = 8


def start(stage: int, kind: str = "llama", **blocks: Any) -> Any:
    """An engine over a fresh small model, with a schedule."""
    schedule = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 5}}
    return engines.lift_engine(cases.build(kind), engines.ds_config(stage, scheduler=schedule, **blocks), SETTINGS)


def state_of(engine: Any) -> dict[str, Any]:
    """Weights, indices, counts and settings of a run."""
    inner = engine.optimizer.optimizer
    return {
        "weights": engines.whole_weights(engine.module),
        "indices": engines.whole_indices(engine.module),
        "applied": [group["lift_steps"] for group in inner.param_groups],
        "decay": [group["weight_decay"] for group in inner.param_groups],
        "adam": sorted({float(state["step"]) for state in inner.state.values()}),
    }


def to_universal(folder: Path, tag: str) -> None:
    """Convert on rank 0."""
    if dist.get_rank() == 0:
        convert(folder / tag, folder / f"{tag}_universal")
    dist.barrier()


def piece(
    stage: int, steps: range, folder: Path, *, resume: str | None, save: str | None, kind: str = "llama"
) -> dict[str, Any]:
    """Some steps of a run, between a universal checkpoint and the next."""
    engine = start(stage, kind)
    if resume:
        engine.load_checkpoint(folder, resume)
    losses = engines.train(engine, "llama", steps)
    if save:
        engine.save_checkpoint(folder, save)
        to_universal(folder, save)
    found = {"losses": losses, **state_of(engine)}
    engine.destroy()
    return found


def stages(folder: Path) -> list[dict[str, Any]]:
    """ZeRO-2, then 3, then 1; cut right before the first refresh and right after the second."""
    return [
        piece(2, range(2), folder, resume=None, save="stage2"),
        piece(3, range(2, 6), folder, resume="stage2_universal", save="stage3"),
        piece(1, range(6, STEPS), folder, resume="stage3_universal", save=None),
    ]


@contextlib.contextmanager
def changed(path: Path, change: Callable[[Path], object]) -> Iterator[None]:
    """Change a file on rank 0, and put it back."""
    if dist.get_rank() == 0:
        shutil.copy(path, f"{path}.kept")
        change(path)
    dist.barrier()
    yield
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.move(f"{path}.kept", path)
    dist.barrier()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def fingerprint(engine: Any) -> float:
    """Something that any change of the weights changes."""
    return sum(tensor.double().abs().sum().item() for tensor in engines.whole_weights(engine.module).values())


def damages(folder: Path) -> dict[str, Any]:
    """Each file of a checkpoint damaged in turn, put in another's place, or taken away."""
    engine = start(2)
    for tag in ("first", "second"):
        engines.train(engine, "llama", range(1))
        engine.save_checkpoint(folder, tag)
    before, messages = fingerprint(engine), {}
    files = sorted(path for path in (folder / "second").iterdir() if path.is_file())
    dist.barrier()  # both have looked before the first change adds a file
    own, others = "zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    actions: dict[str, Callable[[Path], object]] = {"flipped": flip, "cut": cut, "missing": Path.unlink}
    cases_ = {f"{path.name} {name}": (path, action) for path in files for name, action in actions.items()}
    cases_["of the other rank"] = (folder / "second" / own, lambda path: shutil.copy(path.with_name(others), path))
    cases_["of the other checkpoint"] = (
        folder / "second" / own,
        lambda path: shutil.copy(folder / "first" / own, path),
    )
    for name, (path, action) in cases_.items():
        with changed(path, action):
            messages[name] = engines.message_of(lambda: engine.load_checkpoint(folder, "second"))
    untouched = fingerprint(engine) == before
    engine.load_checkpoint(folder, "second")
    engine.destroy()
    return {"messages": messages, "untouched": untouched}


def newest(folder: Path) -> dict[str, Any]:
    """Loading without a tag where the last save did not come to its end; and what DeepSpeed's `latest` says then."""
    engine = start(2)
    steps = []
    for tag in ("one", "two"):
        engines.train(engine, "llama", range(1))
        engine.save_checkpoint(folder, tag)
    steps.append(Path(engine.load_checkpoint(folder)[0]).parent.name)
    engines.train(engine, "llama", range(1))
    latest = (folder / "latest").read_text()
    writer = engine.checkpoint_engine

    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt  # not an error of a writer: nothing behind it runs, as after a SIGKILL

    writer.save = killed
    with contextlib.suppress(KeyboardInterrupt):
        engine.save_checkpoint(folder, "three")
    del writer.__dict__["save"]
    dist.barrier()
    found = {"latest": [latest, (folder / "latest").read_text()]}
    steps.append(Path(engine.load_checkpoint(folder)[0]).parent.name)
    found["steps"] = [*steps, engine.global_steps]
    with contextlib.suppress(KeyboardInterrupt):  # over a whole one, which is no longer whole then
        writer.save = killed
        engine.save_checkpoint(folder, "two")
    del writer.__dict__["save"]
    dist.barrier()
    found["steps"].append(Path(engine.load_checkpoint(folder)[0]).parent.name)
    found["damaged tag"] = engines.message_of(lambda: engine.load_checkpoint(folder, "two"))
    found["frozen left out"] = engines.message_of(
        lambda: engine.save_checkpoint(folder, exclude_frozen_parameters=True)
    )
    engine.save_checkpoint(folder, "apart", save_latest=False)
    found["steps"].append(Path(engine.load_checkpoint(folder)[0]).parent.name)
    other = start(3)
    found["other stage"] = engines.message_of(lambda: other.load_checkpoint(folder))
    other.destroy()
    engine.destroy()
    return found


def full(folder: Path) -> dict[str, Any]:
    """A disk that has room for one checkpoint: the second save, and loading after it."""
    engine = start(2)
    engines.train(engine, "llama", range(2))
    engine.save_checkpoint(folder, "good")
    if dist.get_rank() == 0:
        free = shutil.disk_usage(folder).free
        (folder / "filler").write_bytes(bytes(max(0, free - 60_000)))
    dist.barrier()
    engines.train(engine, "llama", range(1))
    message = engines.message_of(lambda: engine.save_checkpoint(folder, "bad"))
    latest = (folder / "latest").read_text()
    taken, _ = engine.load_checkpoint(folder)
    result = {"message": message, "latest": latest, "taken": Path(taken).parent.name, "step": engine.global_steps}
    engine.destroy()
    return result


def keep(folder: Path) -> None:
    """Save checkpoints of stages 2 and 3 after a refresh, and what the runs lose after it: for later versions."""
    losses = {}
    for stage in (2, 3):
        engine = start(stage)
        engines.train(engine, "llama", range(4))
        engine.save_checkpoint(folder, f"stage{stage}")
        losses[stage] = engines.train(engine, "llama", range(4, STEPS))
        engine.destroy()
    if dist.get_rank() == 0:
        (folder / "losses.json").write_text(json.dumps(losses) + "\n")


def kept(folder: Path) -> dict[str, Any]:
    """Go on from the checkpoints of an earlier version."""
    return {str(stage): continued(stage, folder) for stage in (2, 3)}


def continued(stage: int, folder: Path) -> list[float]:
    engine = start(stage)
    engine.load_checkpoint(folder, f"stage{stage}")
    losses = engines.train(engine, "llama", range(4, STEPS))
    engine.destroy()
    return losses


if __name__ == "__main__":
    engines.start()
    folder = Path(sys.argv[1])
    results: dict[str, Any] = {}
    for job in sys.argv[2:]:
        name, _, path = job.partition("=")
        if name == "whole":
            results[name] = piece(2, range(STEPS), folder, resume=None, save=None)
        elif name in ("stages", "damages", "newest"):
            results[name] = {"stages": stages, "damages": damages, "newest": newest}[name](folder / name)
        elif name in ("full", "keep", "kept"):
            results[name] = {"full": full, "keep": keep, "kept": kept}[name](Path(path))
        else:
            first, last, resume, save = job.split(",")
            steps = range(int(first), int(last))
            results["piece"] = piece(2, steps, folder / "ranks", resume=resume or None, save=save or None)
    engines.finish(str(folder), results)
