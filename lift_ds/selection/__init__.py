"""Which entries of a matrix are principal: pure mathematics on one matrix, no communication.

Read `select` first; `low_rank` and `chebyshev` are the two ways to the low-rank approximation.
"""

from lift_ds.selection.cost import choose_solver, selection_cost
from lift_ds.selection.low_rank import low_rank_factors
from lift_ds.selection.select import Selected, principal_indices, select_principal
from lift_ds.selection.settings import MatrixSize, SelectionSettings
from lift_ds.selection.topk import top_k_positions

__all__ = [
    "MatrixSize",
    "Selected",
    "SelectionSettings",
    "choose_solver",
    "low_rank_factors",
    "principal_indices",
    "select_principal",
    "selection_cost",
    "top_k_positions",
]
