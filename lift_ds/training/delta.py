"""What training changed, as a file beside the saved model (`--save_delta`)."""

from __future__ import annotations

from pathlib import Path

import torch

from lift_ds.delta import DeltaFile, ModelFiles, export_delta, headline, summary_of
from lift_ds.runtime.logs import get_logger
from lift_ds.runtime.ranks import by_main
from lift_ds.training.loading import Base

logger = get_logger()

FILE = "delta.safetensors"


def check(name: str, base: Base, held_in: torch.dtype) -> None:
    """Refuse a delta that could not be written after training, or would hold the whole model; all ranks call.

    Args:
        name: folder or Hub name of the base.
        base: what the saved model is to have of it.
        held_in: dtype of the weights while they are trained.

    Raises:
        ValueError: the base has no safetensors files, or training rounds every weight of it.
    """
    if torch.promote_types(base.dtype, held_in) != held_in:
        raise ValueError(
            f"--save_delta true: {name} is stored in {base.dtype} and would be trained in {held_in}, which rounds "
            "every weight, so that a delta would hold the whole model; train in the dtype of the base "
            f"(--bf16 {'true' if base.dtype == torch.bfloat16 else 'false'}), or convert the base first"
        )
    by_main(lambda: ModelFiles(name).name)


def save(name: str, folder: str) -> None:
    """Compare the saved model with its base's files, and write the delta beside it; for rank 0.

    The model is saved by then. What keeps a delta from being written is therefore said, and ends no run.

    Args:
        name: folder or Hub name of the base.
        folder: of the saved model.
    """
    try:
        file = export_delta(name, folder, Path(folder) / FILE)
    except (ValueError, OSError) as error:
        logger.warning("--save_delta true: no delta was written: %s", error)
        return
    print(f"{file}: {headline(summary_of(DeltaFile(file)))}")
