"""Which operations of a run the watchdog knows: forward, backward, refresh, save and load.

forward    hooks of the model, in training and evaluation
backward   DeepSpeed tells its wrapper: enter_backward before the first layer, exit_backward after the reduction
step       the wrapper's step, after which `bind` lets LIFT run
refresh    each call of the store that communicates, by the name of its matrix
save, load the engine's own methods, where the engine is ours
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lift_ds.model.weights import PrincipalWeight
from lift_ds.refresh.driver import Driver
from lift_ds.refresh.store import PrincipalStore
from lift_ds.runtime import watchdog

#: Methods of a store that may communicate -> what a message calls them.
_STORE_CALLS = {
    "collect": "gathering",
    "hand_out": "handing out the index of",
    "agree": "agreeing on the selections",
    "on_any_rank": "agreeing on the layers that were trained",
    "carry": "carrying states over",
    "turns": "finding who holds which states",
    "total": "adding up what was replaced",
    "write_back": "writing back the trained values",
    "trained": "gathering what is trained in",
    "of_all_parts": "gathering what has left the selections",
    "compare": "comparing the optimizer's state with the weights",
}


class _WatchedStore:
    """A store whose calls are noted as parts of what is going on; everything else is the store's own."""

    def __init__(self, store: PrincipalStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._store, name)
        if name not in _STORE_CALLS:
            return value

        def noted(*args: Any, **kwargs: Any) -> Any:
            about = args[0].name if args and isinstance(args[0], PrincipalWeight) else ""
            with watchdog.during(f"{_STORE_CALLS[name]} {about}".rstrip()):
                return value(*args, **kwargs)

        return noted

    @contextlib.contextmanager
    def whole_index(self, weight: PrincipalWeight) -> Iterator[object]:
        """Only entering the context communicates."""
        with contextlib.ExitStack() as stack:
            with watchdog.during(f"gathering the index of {weight.name}"):
                index = stack.enter_context(self._store.whole_index(weight))
            yield index


def watched_store(store: PrincipalStore) -> PrincipalStore:
    """Return a store that does the same, and tells the watchdog of each call."""
    return cast(PrincipalStore, _WatchedStore(store))


def follow_training(model: nn.Module, wrapper: Any, driver: Driver) -> None:
    """Tell the watchdog of forward and backward, and start it by the setting `stall_timeout`.

    Args:
        model: the model LIFT is attached to, or a wrapper of it.
        wrapper: DeepSpeed's optimizer; a torch optimizer has no backward to follow.
        driver: counts the applied steps.
    """
    attachment = driver.attachment
    for handle in attachment.hooks:
        handle.remove()
    attachment.hooks[:] = _follow_forward(model, driver)
    if hasattr(wrapper, "enter_backward"):
        _follow_backward(wrapper, driver)
    watchdog.start(attachment.config.stall_timeout)


def _follow_forward(model: nn.Module, driver: Driver) -> list[RemovableHandle]:
    def before(module: nn.Module, args: Any) -> None:
        # Compiled, the hook would become a part of the graph; then the forward is not followed.
        if not torch.compiler.is_compiling():
            kind = "forward" if module.training else "evaluation forward"
            watchdog.begin(f"{kind} of step {driver.applied_steps + 1}")

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            error = sys.exc_info()[1]
            if error is not None:
                watchdog.name_operation(error)
            watchdog.end()

    # `always_call`: after an error too.
    return [model.register_forward_pre_hook(before), model.register_forward_hook(after, always_call=True)]


def _follow_backward(wrapper: Any, driver: Driver) -> None:
    enter, leave = wrapper.enter_backward, wrapper.exit_backward

    def enter_backward(self: Any) -> None:
        watchdog.begin(f"backward of step {driver.applied_steps + 1}")
        enter()

    def exit_backward(self: Any) -> None:
        leave()
        watchdog.end()

    wrapper.enter_backward = types.MethodType(enter_backward, wrapper)
    wrapper.exit_backward = types.MethodType(exit_backward, wrapper)


def follow_engine(engine: Any) -> None:
    """Tell the watchdog of backward, save and load of an engine, so that their errors name them too."""
    driver: Driver = engine.optimizer.driver
    for name, operation in (
        ("backward", "backward of step {next}"),
        ("save_checkpoint", "saving the checkpoint of step {now}"),
        ("load_checkpoint", "loading a checkpoint"),
    ):
        setattr(engine, name, types.MethodType(_noted(getattr(engine, name), operation, driver), engine))


def _noted(method: Callable[..., Any], operation: str, driver: Driver) -> Callable[..., Any]:
    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps = driver.applied_steps
        with watchdog.during(operation.format(now=steps, next=steps + 1), whole=True):
            return method(*args, **kwargs)

    return noted
