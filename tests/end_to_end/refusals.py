"""Runs launch/train.py on several command lines, each in a process forked after the imports, which cost most.

python refusals.py CASES.json RESULTS.json     CASES: name -> argv; RESULTS: name -> code, output, seconds
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from forked import alone
from launches import TRAIN

#: Seconds for one case; a case that is not refused trains on, and is ended.
LIMIT = 60


if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("train", TRAIN)
    assert spec is not None
    assert spec.loader is not None
    train = importlib.util.module_from_spec(spec)
    sys.modules["train"] = train
    spec.loader.exec_module(train)
    cases: dict[str, list[str]] = json.loads(Path(sys.argv[1]).read_text())
    results = {
        name: dataclasses.asdict(alone(lambda argv=argv: train.main(argv), Path(f"{sys.argv[1]}.{name}"), LIMIT))
        for name, argv in cases.items()
    }
    Path(sys.argv[2]).write_text(json.dumps(results))
