"""The parity case of mixtures of experts on every ZeRO stage; saves what `parity` saves."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import cases
import engines
import torch.distributed as dist
from parity import run

if __name__ == "__main__":
    engines.start()
    runs = cases.experts_runs(dist.get_world_size(), every="every" in sys.argv)
    results = {f"{kind} stage {stage}": run(kind, stage) for kind, stage in runs}
    engines.finish(sys.argv[1], results)
