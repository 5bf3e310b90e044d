"""Settings of the whole suite."""

from __future__ import annotations

import os
from pathlib import Path

import torch

# Workers on other ranks import the same helpers, and what `benchmarks` counts with; only lift_ds is installed.
TESTS = Path(__file__).parent
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH")]))
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Triton's interpreter runs the kernels on the host; it is chosen when triton is imported, which DeepSpeed does too.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)
