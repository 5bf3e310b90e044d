"""Which entries of a matrix are principal: pure mathematics on one matrix, no communication."""

from lift_ds.selection.carry import PrincipalState, carry_over
from lift_ds.selection.low_rank import low_rank_factors
from lift_ds.selection.principal import principal_indices
from lift_ds.selection.topk import top_k_positions

__all__ = ["PrincipalState", "carry_over", "low_rank_factors", "principal_indices", "top_k_positions"]
