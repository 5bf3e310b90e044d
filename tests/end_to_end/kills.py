"""Trains with launch/train.py's own main on two ranks, kills ranks at random moments, and starts again, many times.

python kills.py PLAN.json RESULTS.json     PLAN: the fields of `Plan`; RESULTS: a list of lives, as dicts

Each life is two processes forked from this one, which has imported everything: real ranks, real gloo, real SIGKILL.
What differs from the documented command is that no launcher ends the ranks that are left: they have to end by
themselves.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import mmap
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["LOCAL_SIZE"] = "2"  # before DeepSpeed is imported
sys.path.insert(0, str(Path(__file__).parents[1]))

from forked import Group

from lift_ds.checkpoint import DESCRIPTION
from lift_ds.runtime import watchdog
from lift_ds.training import launcher

#: Longest waits: for a life to reach what it is to be killed in, or its end; for a rank whose peer was killed.
LIFE_SECONDS, SURVIVOR_SECONDS = 180.0, 75.0

#: Bytes in which a rank tells what it is in.
_SLOT = 256

#: What to kill a rank in -> the beginning of the operation's name; "" for any moment, imports apart.
MOMENTS = {
    "any": "",
    "start": "building",
    "forward": "forward",
    "backward": "backward",
    "step": "step",
    "refresh": "refresh",
    "save": "saving",
}


@dataclass(frozen=True)
class Plan:
    """One campaign."""

    flags: list[str]  # of launch/train.py, without --output_dir
    folder: str
    kills: int
    seed: int


@dataclass
class Life:
    """What became of one start."""

    resumed_from: int  # step of the newest whole checkpoint before the start, 0 for none
    first_step: int | None  # the first step it was seen in
    victim: str  # "rank 0", "rank 1", "all"; "" where it came to its end
    operation: str  # of the victim when it was killed
    survivor: str  # the last line of the rank that was left
    survivor_code: int | None
    survivor_seconds: float
    codes: dict[int, int]
    seconds: float


def load_main() -> Callable[[list[str]], int]:
    launcher.count_local_ranks()
    return importlib.import_module("lift_ds.training.main").run


class Board:
    """What each rank is in, readable after its death, and the first step that rank 0 was seen in."""

    def __init__(self, ranks: int) -> None:
        self._memory = mmap.mmap(-1, _SLOT * (ranks + 1))

    def show(self, rank: int) -> None:
        """In a rank: keep showing what it is in."""
        threading.Thread(target=self._keep_showing, args=(rank,), daemon=True).start()

    def _keep_showing(self, rank: int) -> None:
        first = ""
        while True:
            operation = watchdog.current()
            self._write(rank, operation)
            if rank == 0 and not first and operation.startswith("forward"):
                first = operation
                self._write(2, first)
            time.sleep(0.002)

    def _write(self, slot: int, text: str) -> None:
        content = text.encode()[: _SLOT - 1].ljust(_SLOT, b"\0")
        self._memory[slot * _SLOT : (slot + 1) * _SLOT] = content

    def read(self, slot: int) -> str:
        return self._memory[slot * _SLOT : (slot + 1) * _SLOT].rstrip(b"\0").decode(errors="replace")

    def first_step(self) -> int | None:
        found = re.search(r"step (\d+)", self.read(2))
        return int(found[1]) if found else None


def newest_whole(output: Path) -> int:
    """Return the step of the newest checkpoint that was written to its end, 0 for none."""
    found = output.glob(f"checkpoint-*/{DESCRIPTION}")
    return max((int(path.parent.name.rsplit("-", 1)[1]) for path in found), default=0)


def start_life(main: Callable[[list[str]], int], argv: list[str], folder: Path) -> tuple[Group, Board]:
    board = Board(2)

    def body(rank: int) -> int:
        board.show(rank)
        return main(argv)

    return Group(body, 2, folder), board


def wait_for_moment(group: Group, board: Board, rank: int, moment: str, skip: int, delay: float) -> bool:
    """Wait until a rank is in an operation, past so many others of its kind, and then a little; False if all ended."""
    deadline, wanted, was_in = time.monotonic() + LIFE_SECONDS, MOMENTS[moment], False
    while len(group.poll()) < 2:
        assert time.monotonic() < deadline, f"hangs in {board.read(0)!r}, {board.read(1)!r}\n{group.said(0)[-3000:]}"
        operation = board.read(rank)
        is_in = any(part.startswith(wanted) for part in operation.split(", ")) and bool(operation or not wanted)
        if is_in and not was_in:
            skip -= 1
        if is_in and skip < 0:
            time.sleep(delay)
            return len(group.poll()) < 2
        was_in = is_in and bool(wanted)
        time.sleep(0.001)
    return False


def live(main: Callable[[list[str]], int], plan: Plan, number: int, chance: random.Random) -> Life:
    """Start, kill at a random moment, and see the survivor end; or, where there is nothing to kill, the end."""
    output = Path(plan.folder) / "out"
    resumed_from, began = newest_whole(output), time.monotonic()
    argv = [*plan.flags, "--output_dir", str(output), "--resume_from_checkpoint", "auto"]
    moment = list(MOMENTS)[number % len(MOMENTS)]  # in turn, so that few lives meet all of them
    victims = chance.choice([[0], [1], [0, 1]])
    # Any moment: of the seconds a life takes, the start included. Elsewhere a moment within the operation.
    skip = (
        chance.randrange(8) if moment in ("forward", "backward", "step") else chance.randrange(2) * (moment == "save")
    )
    delay = chance.uniform(0, 5) if moment == "any" else chance.uniform(0, 0.02)
    group, board = start_life(main, argv, Path(plan.folder) / f"life{number}")
    try:
        alive = wait_for_moment(group, board, victims[0], moment, skip, delay)
        operation = board.read(victims[0])
        for rank in victims if alive else ():
            group.send(rank, signal.SIGKILL)
        killed, survivors = time.monotonic(), [rank for rank in (0, 1) if rank not in victims]
        ended = group.wait([0, 1], SURVIVOR_SECONDS)
        assert ended, (
            f"rank {survivors} hangs in {[board.read(r) for r in survivors]}\n{group.said(survivors[0])[-3000:]}"
        )
        survivor_seconds = time.monotonic() - killed
        codes = dict(group.poll())
    finally:
        group.end()
    lines = [
        line
        for rank in survivors
        for line in group.said(rank).splitlines()
        if "error: rank" in line or "no progress" in line
    ] or [""]
    if alive and not any(code == -signal.SIGKILL for code in codes.values()):
        alive = False  # it came to its end before the signal
    return Life(
        resumed_from=resumed_from,
        first_step=board.first_step(),
        victim=("all" if len(victims) == 2 else f"rank {victims[0]}") if alive else "",
        operation=operation if alive else "",
        survivor=lines[-1] if alive else group.said(0)[-500:],
        survivor_code=codes[survivors[0]] if alive and survivors else None,
        survivor_seconds=survivor_seconds,
        codes=codes,
        seconds=time.monotonic() - began,
    )


def campaign(plan: Plan) -> list[Life]:
    """Live until a training has come to its end with at least so many kills; each further training starts anew."""
    main, chance = load_main(), random.Random(plan.seed)
    lives: list[Life] = []
    while sum(bool(life.victim) for life in lives) < plan.kills or lives[-1].victim:
        lives.append(live(main, plan, len(lives), chance))
        print(json.dumps(dataclasses.asdict(lives[-1])), flush=True)
        if not lives[-1].victim:
            if any(lives[-1].codes.values()):
                break  # a start that fails by itself: the test says so
            kept = Path(plan.folder) / f"end{len(lives)}"
            (Path(plan.folder) / "out").rename(kept)
    return lives


def undisturbed(main: Callable[[list[str]], int], flags: list[str], folder: Path) -> dict[int, int]:
    """Train once without a kill; return the exit codes."""
    group, _ = start_life(main, [*flags, "--output_dir", str(folder / "out")], folder)
    try:
        assert group.wait([0, 1], LIFE_SECONDS), group.said(0)[-3000:]
        return dict(group.poll())
    finally:
        group.end()


if __name__ == "__main__":
    content: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    plan = Plan(**content)
    codes = undisturbed(load_main(), plan.flags, Path(plan.folder) / "undisturbed")
    assert set(codes.values()) == {0}, (Path(plan.folder) / "undisturbed" / "rank0.log").read_text()[-4000:]
    Path(sys.argv[2]).write_text(json.dumps([dataclasses.asdict(life) for life in campaign(plan)]))
