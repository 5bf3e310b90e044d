"""Which entries of a matrix are principal: pure mathematics on one matrix, no communication."""

from lift_ds.selection.carry import PrincipalState, carry_over
from lift_ds.selection.choice import choose_solver
from lift_ds.selection.cost import deal_out, selection_cost
from lift_ds.selection.low_rank import low_rank_factors
from lift_ds.selection.principal import Selected, principal_indices, select_principal
from lift_ds.selection.topk import top_k_positions

__all__ = [
    "PrincipalState",
    "Selected",
    "carry_over",
    "choose_solver",
    "deal_out",
    "low_rank_factors",
    "principal_indices",
    "select_principal",
    "selection_cost",
    "top_k_positions",
]
