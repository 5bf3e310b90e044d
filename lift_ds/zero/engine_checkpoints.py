"""What `engine.save_checkpoint` and `engine.load_checkpoint` of a `lift_ds.initialize` engine do beyond DeepSpeed's."""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from deepspeed import comm

from lift_ds import checkpoint
from lift_ds.checkpoint import changes, subspaces
from lift_ds.checkpoint.failed_save import WRITER_ERRORS, SaveError, save_error, stop_together
from lift_ds.model.attachment import require_attachment
from lift_ds.runtime.files import write_whole
from lift_ds.runtime.logs import get_logger
from lift_ds.runtime.ranks import by_main, rank_and_count
from lift_ds.zero.nvme import remove_saved_states, restore_states
from lift_ds.zero.plain_weights import replace_scripts
from lift_ds.zero.universal_files import restore

logger = get_logger()

#: DeepSpeed's file beside the checkpoints that names the one saved last.
LATEST = "latest"


def commit_and_verify(engine: Any) -> None:
    """Let an engine commit what it saves, check what it loads, and load universal checkpoints whole.

    Args:
        engine: DeepSpeed's, over a model with LIFT attached; its two methods are replaced.

    Raises:
        ValueError: for a checkpoint writer that returns before it has written.
    """
    if engine.checkpoint_engine.is_decoupled():
        raise ValueError(
            f"the DeepSpeed configuration asks for {type(engine.checkpoint_engine).__name__}, which goes on writing "
            "after a save has returned, so nobody knows when a checkpoint is whole; leave its setting out"
        )
    engine.save_checkpoint = types.MethodType(_saver(engine.save_checkpoint), engine)
    engine.load_checkpoint = types.MethodType(_loader(engine.load_checkpoint), engine)


def layout_of(engine: Any) -> checkpoint.Layout:
    """Return how the states of an engine are shared out."""
    return checkpoint.Layout(comm.get_world_size(), int(engine.zero_optimization_stage()))


def _saver(save: Any) -> Any:
    def save_checkpoint(
        self: Any,
        save_dir: str,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        if exclude_frozen_parameters:
            raise ValueError(
                "exclude_frozen_parameters=True would leave out the weights and indices that LIFT trains; leave it out"
            )
        require_attachment(self.module).require_selected()
        tag = f"global_step{self.global_steps}" if tag is None else str(tag)
        folder = Path(save_dir) / tag
        try:
            checkpoint.withdraw(folder)
            remove_saved_states(folder)
            by_main(lambda: folder.mkdir(parents=True, exist_ok=True))
            with failures_kept(self, folder) as failures:
                # `latest` names a checkpoint only when it is whole, so that is not for DeepSpeed to write.
                save(save_dir, tag, client_state or {}, save_latest=False)
            stop_together(failures)
            by_main(lambda: replace_scripts(save_dir))
            checkpoint.commit(self.module, folder, step=self.global_steps, layout=layout_of(self), latest=save_latest)
            if save_latest:
                by_main(lambda: write_whole(Path(save_dir) / LATEST, tag))
        except SaveError:
            raise
        except (*WRITER_ERRORS, ValueError) as error:
            raise save_error(folder, error) from error
        return True

    return save_checkpoint


def _loader(load: Any) -> Any:
    def load_checkpoint(self: Any, load_dir: str, tag: str | None = None, *args: Any, **kwargs: Any) -> Any:
        require_attachment(self.module).require_trained()
        layout = layout_of(self)
        tag = str(tag) if tag is not None else by_main(lambda: newest_tag(load_dir, layout))
        folder = os.path.join(load_dir, tag)
        universal = checkpoint.verify(self.module, folder, layout)["universal"]
        # Whatever "load_universal" says in the file: a run that resumed from a universal checkpoint saves plain ones.
        before = self._config.load_universal_checkpoint
        self._config.load_universal_checkpoint = universal
        try:
            result = load(load_dir, tag, *args, **kwargs)
        finally:
            self._config.load_universal_checkpoint = before
        require_attachment(self.module).selected = True
        subspaces.restore(self.module, folder)
        changes.restore(self.module, folder)
        if self.zero_nvme_offload_optimizer():
            restore_states(self.optimizer, folder)
        if universal:
            restore(self.module, self.optimizer, folder)
        self.optimizer.driver.check_state()
        return result

    return load_checkpoint


def newest_tag(load_dir: str, layout: checkpoint.Layout) -> str:
    """Find the newest whole checkpoint of a folder, and say which it is; for one rank.

    Raises:
        ValueError: there is none; names the incomplete ones.
    """
    folders = sorted(path for path in Path(load_dir).glob("*") if path.is_dir() and checkpoint.looks_saved(path))
    choice = checkpoint.newest(folders, layout)
    if choice.taken is not None:
        logger.info("newest whole checkpoint in %s: %s", load_dir, choice)
        return choice.taken
    if choice.passed_over:
        raise ValueError(f"{load_dir!r} holds no whole checkpoint: {choice}")
    raise ValueError(
        f"{os.path.join(load_dir, LATEST)} is missing: {load_dir!r} holds no checkpoint; name one by its tag, or "
        "another folder"
    )


@contextmanager
def failures_kept(engine: Any, directory: str | os.PathLike[str]) -> Iterator[list[SaveError]]:
    """Let a DeepSpeed engine save to its end on this rank, whatever its writers raise.

    A rank that stopped in the middle would leave the others waiting in the next collective of the save. What fails
    outside the writers does end it at once: then nothing can be agreed on any more.

    Args:
        engine: DeepSpeed's engine.
        directory: of the checkpoint.

    Yields:
        What has failed so far; to be given to `stop_together` after the save.
    """
    failures: list[SaveError] = []
    save = engine.save_checkpoint

    def keep(write: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return write(*args, **kwargs)
        except WRITER_ERRORS as error:
            failures.append(save_error(directory, error))

    def save_checkpoint(save_dir: str, *args: Any, **kwargs: Any) -> None:
        # DeepSpeed writes `latest` before its last barrier, where a failure could not be kept.
        try:
            save(save_dir, *args, **{**kwargs, "save_latest": False})
        except WRITER_ERRORS as error:
            raise save_error(directory, error) from error
        if rank_and_count()[0] == 0:
            keep(write_whole, Path(save_dir) / LATEST, f"global_step{engine.global_steps}")

    with ExitStack() as stack:
        for owner, name in ((engine.checkpoint_engine, "save"), (engine, "_copy_recovery_script")):
            stack.enter_context(_replaced(owner, name, partial(keep, getattr(owner, name))))
        stack.enter_context(_replaced(engine, "save_checkpoint", save_checkpoint))
        yield failures


@contextmanager
def _replaced(owner: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Let an object have another method within the context."""
    original = getattr(owner, name)
    setattr(owner, name, method)
    try:
        yield
    finally:
        setattr(owner, name, original)
