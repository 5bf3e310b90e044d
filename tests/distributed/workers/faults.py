"""One rank of two dies or stops in each part of training; what the other one does, case by case.

python faults.py FOLDER CASE...    saves rank0.pt: case -> what rank 0 said, its exit code, seconds after the fault
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import cases
import engines
import torch
import torch.distributed as dist
from forked import Group

import lift_ds

#: Seconds that an operation may last in these runs; in an undisturbed one each takes a few milliseconds.
STALL_TIMEOUT = 4.0

#: Seconds until a rank that has not ended counts as hanging.
LIMIT = 40.0

#: Cases under way at the same time.
AT_A_TIME = 3

#: The fault comes in the third step, with a refresh after it; or in the save or load that follows the second.
FAULT_STEP = 3

Fault = Callable[..., None]


def in_forward(engine: Any, fault: Fault) -> None:
    engine.module.model.layers[1].register_forward_pre_hook(fault)


def in_backward(engine: Any, fault: Fault) -> None:
    engine.module.model.layers[0].register_full_backward_hook(fault)


def in_step(engine: Any, fault: Fault) -> None:
    engine.optimizer.optimizer.register_step_pre_hook(fault)


def in_refresh(engine: Any, fault: Fault) -> None:
    """In handing out the fourth index; in ZeRO-2 those of both ranks' states take turns."""
    store = engine.optimizer.driver.store
    hand_out, calls = store.hand_out, itertools.count()
    store.hand_out = lambda *args: (fault() if next(calls) == 3 else None, hand_out(*args))[1]


def in_save(engine: Any, fault: Fault) -> None:
    engine.optimizer.state_dict = fault


def in_load(engine: Any, fault: Fault) -> None:
    engine.optimizer.load_state_dict = fault


PLACES = {f.__name__.removeprefix("in_"): f for f in (in_forward, in_backward, in_step, in_refresh, in_save, in_load)}


def start_engine(stage: int) -> Any:
    engines.start()
    settings = lift_ds.LiftConfig(budget_rank=4, lra_rank=4, refresh_interval=3, stall_timeout=STALL_TIMEOUT)
    return engines.lift_engine(cases.build("llama"), engines.ds_config(stage), settings)


def run_healthy(rank: int, stage: int, place: str, folder: Path) -> None:
    """Train with a long pause: between two operations ("pause"), or of the whole job within one ("suspend")."""
    engine = start_engine(stage)
    engines.train(engine, "llama", range(2))
    if place == "pause":
        time.sleep(2 * STALL_TIMEOUT)
    else:

        def stop(*_: Any) -> None:
            hook.remove()
            # So that the watch has looked at this operation before, and looks again before it goes on.
            time.sleep(STALL_TIMEOUT / 4)
            (folder / f"stopped{rank}").touch()
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(STALL_TIMEOUT / 4)

        hook = engine.module.model.layers[1].register_forward_pre_hook(stop)
    engines.train(engine, "llama", range(2, 4))
    dist.barrier()  # the first to leave would be a lost rank to the other
    dist.destroy_process_group()


def run_rank(rank: int, stage: int, place: str, number: signal.Signals, folder: Path) -> None:
    """Train, save and load; rank 1 meets its fault on the way."""
    engine = start_engine(stage)

    def fault(*_: Any, **__: Any) -> None:
        (folder / "fault").write_text(str(time.time()))
        os.kill(os.getpid(), number)

    engines.train(engine, "llama", range(FAULT_STEP - 1))
    if rank == 1:
        PLACES[place](engine, fault)
    if place in ("save", "load"):
        engine.save_checkpoint(str(folder / "checkpoint"))
        engine.load_checkpoint(str(folder / "checkpoint"))
    engines.train(engine, "llama", range(FAULT_STEP - 1, FAULT_STEP + 1))


def start_case(name: str, base: Path) -> Group:
    """Start the ranks of a case; its name is "<signal> <place> <stage>", NONE for no fault."""
    signal_name, place, stage = name.split()
    folder = base / name.replace(" ", "-")
    if signal_name == "NONE":
        return Group(lambda rank: run_healthy(rank, int(stage), place, folder), 2, folder)
    return Group(lambda rank: run_rank(rank, int(stage), place, signal.Signals[signal_name], folder), 2, folder)


def outcome(group: Group) -> dict[str, Any]:
    """Wait for rank 0 and end the rest; wake a job that was suspended as a whole."""
    if "suspend" in group.folder.name:
        while not all((group.folder / f"stopped{rank}").exists() for rank in (0, 1)) and not group.poll():
            time.sleep(0.05)
        time.sleep(1.5 * STALL_TIMEOUT)
        for rank in (0, 1):
            group.send(rank, signal.SIGCONT)
    ended = group.wait([0], LIMIT)
    code = group.poll().get(0)
    group.end()
    fault = group.folder / "fault"
    seconds = group.ended[0] - float(fault.read_text()) if ended and fault.exists() else None
    return {"code": code, "seconds": seconds, "said": group.said(0), "other": group.said(1)}


def run_all(names: list[str], base: Path) -> dict[str, dict[str, Any]]:
    """Run the cases, several at a time: most of each is waiting."""
    waiting, running, results = list(names), dict[str, Group](), {}
    while waiting or running:
        while waiting and len(running) < AT_A_TIME:
            running[waiting[0]] = start_case(waiting[0], base)
            waiting.pop(0)
        name = next(iter(running))
        results[name] = outcome(running.pop(name))
    return results


if __name__ == "__main__":
    base = Path(sys.argv[1])
    torch.save(run_all(sys.argv[2:], base), base / "rank0.pt")
