"""How a selection is stored, two bytes an entry, and how a matrix is read and written through it.

Read `encoding` first, for the format, then `access`, for what is done with it; `kernels` has the fast forms.
"""
