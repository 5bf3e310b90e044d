"""What becomes of a model: which layers are managed, what is put into them, and how it is undone.

Read `layers` first, then `attach`.
"""
