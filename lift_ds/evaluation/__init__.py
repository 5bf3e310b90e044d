"""What a trained model can do, and what it still knows: tasks of the lm-evaluation-harness, losses, and KL.

Read `measure` first, which says what there is to ask for and in which order it is done.
"""

from lift_ds.evaluation.measure import evaluate
from lift_ds.evaluation.request import EvaluationRequest

__all__ = ["EvaluationRequest", "evaluate"]
