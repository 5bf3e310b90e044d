"""The bookkeeping of the watchdog: what is noted, nested and forgotten, and which errors tell of a lost rank.

That the watch ends a process, and one that only pauses not, is pinned down with real ranks in tests/distributed.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from cases import build, loss_of

import lift_ds
from lift_ds.runtime import watchdog
from lift_ds.zero.bind import bind

GLOO = "[pair.cc:553] gloo: Connection closed by peer [127.0.0.1]:58582"


@pytest.fixture(autouse=True)
def nothing_noted() -> Iterator[None]:
    watchdog.end()
    yield
    watchdog.end()


def test_parts_are_named_within_their_operation() -> None:
    watchdog.begin("step 3")
    with watchdog.during("refresh at step 3"), watchdog.during("selecting in q"):
        assert watchdog.current() == "step 3, refresh at step 3, selecting in q"
    assert watchdog.current() == "step 3"
    watchdog.end()
    assert watchdog.current() == ""


def test_an_operation_replaces_one_that_an_error_left_open() -> None:
    watchdog.begin("backward of step 3")
    with watchdog.during("saving", whole=True):
        assert watchdog.current() == "saving"
    assert watchdog.current() == ""


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError(GLOO), True),
        (RuntimeError("NCCL communicator was aborted on rank 1"), True),
        (dist.DistNetworkError("the client socket has failed"), True),
        (RuntimeError("CUDA out of memory"), False),
        (ValueError("gloo"), False),
        (ConnectionResetError("connection reset by peer"), False),  # a download, not a collective
    ],
)
def test_errors_of_a_lost_rank_are_told_from_others(error: Exception, lost: bool) -> None:
    assert watchdog.is_lost_rank(error) == lost
    with pytest.raises(type(error)) as caught, watchdog.during("step 3"), watchdog.during("writing back q"):
        raise error
    assert watchdog.named_operation(caught.value) == ("step 3, writing back q" if lost else "")
    assert len(getattr(caught.value, "__notes__", [])) == lost


def test_forward_is_noted_in_training_and_evaluation_and_until_detach() -> None:
    model = lift_ds.attach(build("llama"), lift_ds.LiftConfig(budget_rank=2, lra_rank=2))
    bind(model, lift_ds.LiftAdamW(model))
    seen: list[str] = []
    model.model.register_forward_hook(lambda *_: seen.append(watchdog.current()))
    loss_of(model, "llama", 0)
    loss_of(model.eval(), "llama", 0)
    lift_ds.detach(model)
    loss_of(model, "llama", 0)
    assert seen == ["forward of step 1", "evaluation forward of step 1", ""]
    assert watchdog.current() == ""


def test_an_error_in_forward_ends_it_and_gains_its_name() -> None:
    model = lift_ds.attach(build("llama"), lift_ds.LiftConfig(budget_rank=2, lra_rank=2))
    bind(model, lift_ds.LiftAdamW(model))

    def lose(*_: object) -> None:
        raise RuntimeError(GLOO)

    model.model.register_forward_pre_hook(lose)
    with pytest.raises(RuntimeError) as caught:
        loss_of(model, "llama", 0)
    assert watchdog.named_operation(caught.value) == "forward of step 1"
    assert watchdog.current() == ""


def test_one_process_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_thread", None)
    watchdog.start(1.0)
    assert watchdog._thread is None


def test_the_oldest_operation_that_the_device_has_not_finished_is_the_one_to_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The device's part is a dictionary here: which operation it has finished. It is asked in order, and no further."""
    finished = {"forward of step 1": True, "backward of step 1": False, "step 1": False}
    monkeypatch.setattr(watchdog, "_device_finished", lambda pending: finished[pending.operation])
    monkeypatch.setattr(watchdog, "_watched", watchdog._Watched())
    watchdog._watched.pending.extend(watchdog._Pending(operation, None, 0) for operation in finished)
    watchdog.begin("forward of step 2")
    assert watchdog._progress()[1] == "backward of step 1 (the device has not finished it)"
    before = watchdog._progress()[0]
    watchdog.begin("backward of step 2")  # the host running on is no progress of the device
    assert watchdog._progress()[0] == before
    finished["backward of step 1"] = finished["step 1"] = True
    assert watchdog._progress()[1] == "backward of step 2"
    watchdog.end()
    assert watchdog._progress()[1] == ""
