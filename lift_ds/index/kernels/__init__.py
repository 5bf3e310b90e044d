"""The forms of `lift_ds.index.entries.Entries`: torch's operators, compiled C for the host, Triton for CUDA.

Read `torch_entries` first: it is what the others are tested against.
"""
