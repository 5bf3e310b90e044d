"""The comparison of methods, `python -m benchmarks.methods`: full fine-tuning, LoRA, LIFT and other choices of the
trained entries on one pretrained model, each at its best learning rate; what is learned, and what is forgotten.

Read `studies` first (what is compared), then `cells` (which runs that makes), `runs` (one run) and `command`.
"""
