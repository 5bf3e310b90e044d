"""Runs launch/train.py on several command lines, each in a process forked after the imports, which cost most.

python refusals.py CASES.json RESULTS.json     CASES: name -> argv; RESULTS: name -> code, output, seconds
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
import traceback
from pathlib import Path

from launches import TRAIN

#: Seconds for one case; a case that is not refused trains on, and is ended.
LIMIT = 60


def run_case(main, argv: list[str], log: Path) -> dict[str, object]:  # type: ignore[no-untyped-def]
    """Run the main job in a child of its own; its exit code, and what it wrote."""
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        try:
            code = main(argv)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    while time.monotonic() - began < LIMIT:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return {"code": code, "output": log.read_text(), "seconds": time.monotonic() - began}
        time.sleep(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return {"code": None, "output": log.read_text(), "seconds": time.monotonic() - began}


if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("train", TRAIN)
    assert spec is not None
    assert spec.loader is not None
    train = importlib.util.module_from_spec(spec)
    sys.modules["train"] = train
    spec.loader.exec_module(train)
    cases: dict[str, list[str]] = json.loads(Path(sys.argv[1]).read_text())
    results = {name: run_case(train.main, argv, Path(sys.argv[1] + f".{name}")) for name, argv in cases.items()}
    Path(sys.argv[2]).write_text(json.dumps(results))
