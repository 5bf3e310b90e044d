"""`python -m benchmarks.methods`."""

from __future__ import annotations

import os
import sys

# Looking for a GPU must not start CUDA in this process: the runs are forked from it, and CUDA cannot be forked.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

from benchmarks.methods.command import main

if __name__ == "__main__":
    sys.exit(main())
