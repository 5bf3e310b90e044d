"""The planner: what a run will hold, send and take, from a model's configuration alone.

Read `plan` first, then `formulas`. `command` is `lift-ds plan`.
"""
