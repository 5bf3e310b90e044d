"""The forms of `lift_ds.index.access.Access`: torch's operators, compiled C for the host, Triton for CUDA.

Read `torch_access` first: it is what the others are tested against.
"""
