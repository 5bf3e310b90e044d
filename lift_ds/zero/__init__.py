"""LIFT on DeepSpeed, the only room that knows it: states and weights that ZeRO shares out over the ranks.

Read `bind` first, then `stores`.
"""
