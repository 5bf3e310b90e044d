"""What launch/train.py is made of: arguments, loading, reporting, saving. Needs the `trl` extra."""
