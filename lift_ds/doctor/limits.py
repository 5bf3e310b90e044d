"""What a call gives within a limited time, whatever it waits for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

Value = TypeVar("Value")


def within(seconds: float, action: Callable[[], Value], about: str) -> Value:
    """Return what an action returns; it runs in a thread of its own, which is left behind where it takes longer.

    A hung network file system answers no signal, so there is no other way to go on without it.

    Args:
        seconds: how long it may take.
        action: what to do.
        about: what to call it in the error.

    Raises:
        OSError: it has not returned within the limit (TimeoutError), or raised one.
        Exception: whatever it raised.
    """
    ended: dict[str, Any] = {}

    def run() -> None:
        try:
            ended["value"] = action()
        except BaseException as error:
            ended["error"] = error

    thread = threading.Thread(target=run, name=about, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"{about} has not ended within {seconds:g} s")
    if "error" in ended:
        raise ended["error"]
    return ended["value"]
