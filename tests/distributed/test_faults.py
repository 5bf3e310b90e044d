"""When a rank dies or stops in any part of training, the other one ends in time and says what it was in.

A rank that is killed closes its connections, so gloo raises and the error carries the operation. A rank that is stopped
keeps them open, as a lost network does, and as NCCL may: then the watch ends the process. Rank 1 meets the fault; what
rank 0 is in when it notices follows from the collectives, under ZeRO-2 (none in forward) and ZeRO-3.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import LIMIT_SECONDS, WORKERS, rank_environment

from lift_ds.runtime import watchdog

#: "<signal> <where rank 1 meets it> <ZeRO stage>" -> what rank 0 names, as a pattern.
QUICK = {
    "SIGKILL forward 3": "forward of step 3",
    "SIGKILL backward 2": "backward of step 3",
    "SIGKILL save 2": "saving the checkpoint of step 2",
    "SIGSTOP forward 2": "backward of step 3",
    "SIGSTOP refresh 3": "step 3, refresh at step 3, handing out the index of model.layers.0.self_attn.o_proj",
    "SIGSTOP save 3": "saving the checkpoint of step 2",
}

#: Where the states are read nothing need be exchanged: then it is noticed in the first operation behind.
COMPARING = "comparing the optimizer's state with the weights"
LOADING = f"loading a checkpoint|loading a checkpoint, {COMPARING}"
AFTER_LOAD = {2: f"{LOADING}|backward of step 3", 3: f"{LOADING}|forward of step 3"}

REST = {
    "SIGKILL forward 2": "backward of step 3",
    "SIGKILL backward 3": "backward of step 3",
    "SIGKILL step 2": "step 3",
    "SIGKILL step 3": f"step 3, refresh at step 3, {COMPARING}",
    "SIGKILL refresh 2": "step 3, refresh at step 3, handing out the index of model.layers.1.self_attn.k_proj",
    "SIGKILL refresh 3": "step 3, refresh at step 3, handing out the index of model.layers.0.self_attn.o_proj",
    "SIGKILL save 3": "saving the checkpoint of step 2",
    "SIGKILL load 2": AFTER_LOAD[2],
    "SIGKILL load 3": AFTER_LOAD[3],
    "SIGSTOP forward 3": "forward of step 3",
    "SIGSTOP backward 2": "backward of step 3",
    "SIGSTOP backward 3": "backward of step 3",
    "SIGSTOP step 2": "step 3",
    "SIGSTOP step 3": f"step 3, refresh at step 3, {COMPARING}",
    "SIGSTOP refresh 2": "step 3, refresh at step 3, handing out the index of model.layers.1.self_attn.k_proj",
    "SIGSTOP save 2": "saving the checkpoint of step 2",
    "SIGSTOP load 2": AFTER_LOAD[2],
    "SIGSTOP load 3": AFTER_LOAD[3],
}

#: Longer than the limit, but no fault: the user's code between two operations; the whole job suspended within one.
HEALTHY = ("NONE pause 2", "NONE suspend 2")

#: Seconds within which rank 0 is to be gone: the limit of these runs is 4, and the machine may be shared.
GONE_SECONDS = 20.0

Results = dict[str, dict[str, Any]]


def run_cases(names: list[str], folder: Path) -> Results:
    """Run the cases in processes forked from one that has imported everything."""
    command = [sys.executable, str(WORKERS / "faults.py"), str(folder), *names]
    done = subprocess.run(
        command, env=rank_environment(2), capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return torch.load(folder / "rank0.pt", weights_only=False)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_cases([*HEALTHY, *QUICK], tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_cases(list(REST), tmp_path_factory.mktemp("more_faults"))


def check(result: dict[str, Any], name: str, operation: str) -> None:
    """The rank ended within the limit, with the exit code and the words of its kind of fault."""
    said = f"rank 0:\n{result['said'][-4000:]}\nrank 1:\n{result['other'][-3000:]}"
    assert result["seconds"] is not None, f"rank 0 did not end after the fault, or there was none\n{said}"
    assert result["seconds"] < GONE_SECONDS, said
    if name.startswith("SIGSTOP"):
        assert result["code"] == watchdog.STALLED, said
        assert re.search(rf" s in ({operation})\. Another rank", result["said"]), said
    else:  # uncaught, so Python's own code
        assert result["code"] == 1, said
        assert re.search(rf"noticed in ({operation})\n", result["said"]), said


@pytest.mark.parametrize("name", QUICK)
def test_a_lost_rank_is_noticed_and_the_operation_named(name: str, quick: Results) -> None:
    check(quick[name], name, QUICK[name])


@pytest.mark.parametrize("name", HEALTHY)
def test_a_pause_that_is_no_fault_ends_nothing(name: str, quick: Results) -> None:
    assert quick[name]["code"] == 0, f"{quick[name]['said'][-4000:]}\n{quick[name]['other'][-4000:]}"


@pytest.mark.slow  # the other places and stages
@pytest.mark.parametrize("name", REST)
def test_a_lost_rank_is_noticed_anywhere(name: str, rest: Results) -> None:
    check(rest[name], name, REST[name])
