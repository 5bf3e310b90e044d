"""Runs launch/train.py on several command lines, each in a process forked after the imports, which cost most.

python refusals.py CASES.json RESULTS.json     CASES: name -> argv; RESULTS: name -> code, output, seconds
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from forked import alone

from lift_ds.training import launcher

#: Seconds for one case; a case that is not refused trains on, and is ended.
LIMIT = 60


if __name__ == "__main__":
    launcher.count_local_ranks()
    main = importlib.import_module("lift_ds.training.main")
    cases: dict[str, list[str]] = json.loads(Path(sys.argv[1]).read_text())
    results = {
        name: dataclasses.asdict(alone(lambda argv=argv: main.run(argv), Path(f"{sys.argv[1]}.{name}"), LIMIT))
        for name, argv in cases.items()
    }
    Path(sys.argv[2]).write_text(json.dumps(results))
