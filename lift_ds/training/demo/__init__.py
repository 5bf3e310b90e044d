"""A run that needs no download: generated text, and a small base model trained on one kind of it.

Read `run` first; `texts` generates, `base` trains the model.
"""
