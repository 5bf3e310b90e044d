"""Selecting by gradients: the batches they are measured on, and the selection before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest

from torch import Tensor, nn

from lift_ds.model.attachment import Attachment, require_attachment
from lift_ds.model.gradients import Batch, GradientMeter, Loss, groups_of, own_loss
from lift_ds.refresh.schedule import Jobs
from lift_ds.refresh.store import PrincipalStore
from lift_ds.runtime.ranks import together
from lift_ds.selection.memory import gradient_entries


def select_by_gradients(model: nn.Module, batches: Iterable[Batch], loss: Loss = own_loss) -> None:
    """Give the batches on which the criterion "gradient" measures gradients, and select by them.

    Call it before the first step, when the optimizer or engine is built; `LiftCallback` does. All ranks call, with the
    same batches. Refreshes measure on the same batches again. After a resume it selects nothing, since the checkpoint
    has brought the index.

    Args:
        model: with LIFT attached by a configuration with `criterion="gradient"`.
        batches: what the model is called with, by name; on its device.
        loss: of the model on a batch; by default the one that the model itself computes from labels.

    Raises:
        ValueError: the criterion is another one, no optimizer is built, there are no batches, the ranks have different
            ones, or a batch gives no loss.
    """
    attachment = require_attachment(model)
    if not attachment.needs_gradients:
        raise ValueError(f"criterion={attachment.config.criterion!r} does not look at gradients; give 'gradient'")
    if attachment.driver is None:
        raise ValueError("no optimizer is built for the model yet; select by gradients after that")
    meter = GradientMeter(model, list(batches), loss, attachment.config.seed)
    sums = together(meter.checksum)
    if len(set(sums)) > 1:
        raise ValueError(f"the ranks measure gradients on different batches (checksums {sums}); give all the same")
    if meter.is_empty:
        raise ValueError("there are no batches to measure gradients on; give at least one")
    attachment.gradients = meter
    if attachment.driver.applied_steps == 0:
        try:
            attachment.driver.select_now()
        except BaseException:
            attachment.gradients = None  # nothing was selected by them, so training is still refused
            raise


def in_groups(jobs: Jobs, attachment: Attachment) -> list[Jobs]:
    """Cut the jobs of all ranks into groups of matrices whose gradients are there at once.

    Args:
        jobs: for each rank the names of its matrices.
        attachment: the managed weights.

    Returns:
        For each group the jobs of all ranks in it; a rank that has done its own has none in the last ones.
    """
    entries = {name: weight.shape().numel() for name, (weight, _) in attachment.matrices.items()}
    most = gradient_entries(max(entries.values()), attachment.config.refresh_memory_gib)
    of_ranks: list[list[Sequence[str]]] = [
        [own[group] for group in groups_of([entries[name] for name in own], most)] for own in jobs
    ]
    return [[list(own) for own in group] for group in zip_longest(*of_ranks, fillvalue=[])]


def gradients_of(names: Sequence[str], attachment: Attachment, store: PrincipalStore) -> dict[str, Tensor]:
    """Return mean |dL/dW| of some matrices by name; nothing where the criterion does not look at gradients.

    Args:
        names: of the matrices of a group on this rank.
        attachment: the managed weights.
        store: where their state lives.
    """
    if not attachment.needs_gradients:
        return {}
    assert attachment.gradients is not None, "training without batches is refused"
    matrices = attachment.matrices
    wanted = {name: matrices[name] for name in names}
    return attachment.gradients.measure(wanted, attachment.weights.values(), store.sharded, store.end_backward)
