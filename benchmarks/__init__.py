"""What is measured of LIFT, beside full fine-tuning and LoRA: a script for each question, run from a checkout as
`python -m benchmarks.refresh` and the like; `measure/` has what they share, `scaling/` the study over ranks and nodes.
Read `footprint.py` first.
"""

import os

# DeepSpeed reads it when it is imported: the host, where nobody has named a device.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
