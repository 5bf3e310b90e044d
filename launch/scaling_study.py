"""Measure how training scales over ranks and nodes: full fine-tuning, LoRA and LIFT, by ZeRO stage and link.

    python launch/scaling_study.py --ranks 1 2 4 --stages 2 3                                # processes of this machine
    python launch/scaling_study.py --launcher hostfile --hostfile hostfile --nodes 1 2 --ranks 1 2 16 \\
        --link-name ethernet --link-gbit 25 --interface eth0 --device cuda
    python launch/scaling_study.py --launcher slurm --nodes 1 2 4 --ranks 1 8 16 32 --sbatch="--gpus-per-node=8" ...

Writes into --output: measurements.csv, a row for each run; report.md, with the planner's prediction beside each
measurement; plots. A cell that has a row is not run again, so an interrupted study continues, and further invocations
(other links, other stages) add to the same file; --retry runs those again that failed. docs/scaling.md says more.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout: benchmarks are not installed

from benchmarks.scaling.command import main

if __name__ == "__main__":
    sys.exit(main(__doc__))
