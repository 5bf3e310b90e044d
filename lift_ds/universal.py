"""Convert a checkpoint so that it resumes on any number of ranks and in any of the ZeRO stages 1, 2 and 3.

    python -m lift_ds.universal DIR/TAG DIR/TAG_universal                    of a lift_ds.initialize engine
    python -m lift_ds.universal out/checkpoint-200 out/checkpoint-200-universal   of launch/train.py or a Trainer

One process, no accelerator; both folders hold the whole model, and the new one is committed like any checkpoint.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from lift_ds import checkpoint
from lift_ds.checkpoint import rank_files
from lift_ds.checkpoint.failed_save import WRITER_ERRORS, save_error
from lift_ds.runtime.files import write_whole
from lift_ds.runtime.ranks import alone
from lift_ds.zero.universal_files import SavedRun, write_universal

#: Exit codes: the checkpoint cannot be converted; the converted one could not be written.
REFUSED, UNSAVED = 2, 74

#: Files of a Trainer's checkpoint that resuming under DeepSpeed does not read.
_NOT_NEEDED = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "zero_to_*.py", "latest*", "lift.json")


def convert(source: Path, target: Path) -> int:
    """Convert a checkpoint; for one process, also where it is one rank of several.

    Args:
        source: a committed checkpoint: a tag's folder, or a `checkpoint-<step>` folder of a Trainer.
        target: a folder to be made.

    Returns:
        How many tensors it has.

    Raises:
        ValueError: the source is not whole or not one of DeepSpeed's, or the target exists.
        SaveError: the target could not be written.
    """
    with alone():
        return _convert(source, target)


def _convert(source: Path, target: Path) -> int:
    description = checkpoint.read(source)
    if description["universal"]:
        raise ValueError(f"{source}: is a universal checkpoint already")
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target}: exists and is not empty; name another folder, or remove it")
    checkpoint.verify_files(description, source)
    inner = _inner(source)
    run = SavedRun(source / inner, description["ranks"], description["zero_stage"])
    try:
        (target / inner).mkdir(parents=True, exist_ok=True)
        tensors = write_universal(run, target / inner)
        for kind in (rank_files.SUBSPACES, rank_files.CHANGES):
            for path in rank_files.paths(kind, source):
                shutil.copy(path, target)
        if inner:
            shutil.copytree(source, target, ignore=shutil.ignore_patterns(*_NOT_NEEDED, inner), dirs_exist_ok=True)
        named = (target, inner) if inner else (target.parent, target.name)
        write_whole(named[0] / "latest_universal", named[1])
        # Still as old as what it was made of, so that a later checkpoint of the run is newer.
        files_apart = {key: value for key, value in description.items() if key not in ("format", "files")}
        checkpoint.commit_as({**files_apart, "universal": True}, target)
    except (*WRITER_ERRORS, ValueError) as error:
        raise save_error(target, error) from error
    return tensors


def _inner(source: Path) -> str:
    """Name the folder with DeepSpeed's states in a Trainer's checkpoint; empty where they lie in the folder itself."""
    if any(source.glob("*_optim_states.pt")):
        return ""
    inner = sorted(path.name for path in source.glob("global_step*") if path.is_dir())
    if len(inner) != 1:
        raise ValueError(f"{source}: holds no states of DeepSpeed's ZeRO stages 1 to 3, so there is nothing to convert")
    return inner[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m lift_ds.universal", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="a tag's folder, or a checkpoint-<step> folder")
    parser.add_argument("target", type=Path, help="folder of the universal checkpoint; must not exist yet")
    args = parser.parse_args(argv)
    try:
        tensors = convert(args.source, args.target)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return UNSAVED
    print(f"{args.target}: universal checkpoint of {args.source}, {tensors} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
