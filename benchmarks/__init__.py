"""What is measured of LIFT, beside full fine-tuning and LoRA: a script for each question, run from a checkout as
`python -m benchmarks.refresh` and the like; `measure/` has what they share, `scaling/` the study over ranks and nodes.
Read `footprint.py` first.
"""

import os

# Read when DeepSpeed and transformers are imported: the host, where nobody has named a device; and no model is fetched.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
