"""Pins what training has changed, in one process: a copy kept by patches equals the trained model to the bit, also
where entries leave the selection and come back; the weights before training come back to the bit, and errors, saves and
training within them leave the trained ones; the settings it takes, checkpoints, `detach`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import build, loss_of
from helpers import layers_of, same_bits, train
from torch import Tensor, nn

import lift_ds
from lift_ds.checkpoint import changes as saved_changes
from lift_ds.checkpoint import commit, verify
from lift_ds.model.attachment import require_attachment
from lift_ds.refresh import changes
from lift_ds.refresh.entries import Entries, Part

STEPS = 9

Weights = dict[str, Tensor]


def config_of(kind: str, **settings: Any) -> lift_ds.LiftConfig:
    """Refreshes after every second step, at a rate at which entries leave the selection and come back."""
    given: dict[str, Any] = {"keep_base": True, "track_changes": True, **settings}
    extra = () if kind == "matrices" else ("norm.weight",)
    return lift_ds.LiftConfig(
        density=0.1, lra_rank=4, refresh_interval=2, solver="gram", lr=3e-2, extra_trainable=extra, **given
    )


def started(
    kind: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any
) -> tuple[nn.Module, lift_ds.LiftAdamW]:
    model = lift_ds.attach(build(kind, dtype), config_of(kind, **settings))
    return model, lift_ds.LiftAdamW(model, lr=3e-2)


def plain_of(model: nn.Module, names: Weights) -> Weights:
    state = model.state_dict()
    return {name: state[name].clone() for name in names}


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


def patch(copy: Weights, model: nn.Module, since: int | None) -> dict[str, int]:
    """Bring a copy up to date; returns how many values it took for each parameter."""
    took = {}
    for name, shape, indices, values in lift_ds.changed_entries(model, since):
        assert copy[name].shape == shape
        took[name] = values.numel()
        if indices is None:
            copy[name].copy_(values.view(shape))
        else:
            assert indices.unique().numel() == indices.numel()
            copy[name].view(-1)[indices.long()] = values
    return took


@pytest.mark.parametrize(
    ("kind", "dtype"), [("llama", torch.bfloat16), ("mixtral", torch.float32), ("matrices", torch.float32)], ids=str
)
def test_copies_follow_and_the_base_comes_back(kind: str, dtype: torch.dtype) -> None:
    model, optimizer = started(kind, dtype)
    base = {name: value.clone() for name, value in build(kind, dtype).state_dict().items()}
    each, third = ({name: value.clone() for name, value in base.items()} for _ in range(2))
    ever: dict[str, set[int]] = {weight.full_name: set() for weight in layers_of(model).values()}
    left_twice = False
    for step in range(STEPS):
        before = {weight.full_name: set(weight.principal_index.tolist()) for weight in layers_of(model).values()}
        left_twice |= any(not selected.isdisjoint(gone_from(model, name)) for name, selected in before.items())
        for name, selected in before.items():
            ever[name] |= selected
        train(model, optimizer, kind, range(step, step + 1))
        took = patch(each, model, step)
        assert set(took) == {*ever, *(("model.norm.weight",) if kind != "matrices" else ())}
        trained = plain_of(model, base)
        assert same(each, trained)
        if step % 3 == 2:
            patch(third, model, step - 2)
            assert same(third, trained)
        with lift_ds.base_weights(model):
            assert same(plain_of(model, base), base)
        assert same(plain_of(model, base), trained)
    everything = {name: value.clone() for name, value in base.items()}
    took = patch(everything, model, None)
    assert same(everything, trained)
    assert all(took[name] == len(ever[name]) for name in ever)
    assert not left_twice, "what is selected again is not recorded as gone"
    record = require_attachment(model).driver.changes
    for weight in layers_of(model).values():
        assert set(record.base[weight.name].positions().tolist()) == ever[weight.full_name]


def gone_from(model: nn.Module, full_name: str) -> set[int]:
    """What is recorded as gone from the selection of a weight."""
    left = require_attachment(model).driver.changes.left or {}
    name = next(weight.name for weight in layers_of(model).values() if weight.full_name == full_name)
    return set(left[name].entries.positions().tolist()) if name in left else set()


def test_entries_come_back_in_these_runs() -> None:
    """Else the tests above could not tell an entry that left twice from one that left once."""
    model, optimizer = started()
    seen: list[set[int]] = []
    for step in range(STEPS):
        seen.append(set(layers_of(model)["model.layers.0.mlp.up_proj"].principal_index.tolist()))
        train(model, optimizer, "llama", range(step, step + 1))
    assert any(
        (first - second) & third for first, second, third in zip(seen[::2], seen[2::2], seen[4::2], strict=False)
    )


def test_refreshes_beyond_those_that_are_told_apart_become_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then a patch has more than it needs, and none less."""
    monkeypatch.setattr(changes, "_MOST_REFRESHES", 3)
    model, optimizer = started("matrices")
    follower = {name: value.clone() for name, value in build("matrices").state_dict().items()}
    for step in range(14):
        train(model, optimizer, "matrices", range(step, step + 1))
        if step % 3 == 2:
            patch(follower, model, step - 2)
            assert same(follower, plain_of(model, follower))
    assert len(require_attachment(model).driver.changes.left["tall"].steps) <= 3


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_training_does_not_notice(kind: str) -> None:
    """Between forward and backward too, where autograd keeps views of the weights of experts."""
    ends = []
    for looks in (False, True):
        model, optimizer = started(kind)
        for step in range(5):
            loss = loss_of(model, kind, step)
            if looks:
                with lift_ds.base_weights(model), torch.no_grad():
                    loss_of(model, kind, step)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(plain_of(model, build(kind).state_dict()))
    assert same(*ends)


def test_an_error_leaves_the_trained_weights() -> None:
    model, optimizer = started("matrices")
    train(model, optimizer, "matrices", range(3))
    trained = plain_of(model, build("matrices").state_dict())
    with pytest.raises(KeyError), lift_ds.base_weights(model), lift_ds.base_weights(model):
        raise KeyError
    assert same(plain_of(model, trained), trained)
    train(model, optimizer, "matrices", range(3, 4))


def test_nothing_is_trained_or_saved_within(tmp_path: Path) -> None:
    model, optimizer = started("matrices")
    loss_of(model, "matrices", 0).backward()
    optimizer.step()
    loss = loss_of(model, "matrices", 1)
    for attempt in (
        lambda: loss_of(model, "matrices", 1),
        lambda: model.eval()(torch.zeros(1, 60)),
        loss.backward,
        optimizer.step,
        lambda: commit(model, tmp_path),
        lambda: lift_ds.changed_entries(model),
        lambda: lift_ds.detach(model),
    ):
        with lift_ds.base_weights(model), pytest.raises(RuntimeError, match="the weights are those before training"):
            attempt()
    with lift_ds.base_weights(model), torch.no_grad():
        assert loss_of(model, "matrices", 1) != loss
    assert not list(tmp_path.iterdir())


def test_before_the_first_step_nothing_has_changed() -> None:
    model = lift_ds.attach(build("matrices"), config_of("matrices"))
    for _ in range(2):
        assert not list(lift_ds.changed_entries(model))
        with lift_ds.base_weights(model), pytest.raises(RuntimeError):
            loss_of(model, "matrices", 0)
        optimizer = lift_ds.LiftAdamW(model)
        assert (lift_ds.applied_steps(model), optimizer.driver.applied_steps) == (0, 0)


def test_without_the_settings_it_says_which_one_to_give() -> None:
    model, optimizer = started("matrices", keep_base=False, track_changes=False)
    train(model, optimizer, "matrices", range(3))
    with pytest.raises(ValueError, match=r"track_changes=False: .* give track_changes=True to LiftConfig"):
        lift_ds.changed_entries(model)
    with pytest.raises(ValueError, match=r"keep_base=False: .* give keep_base=True"), lift_ds.base_weights(model):
        pass
    with pytest.raises(ValueError, match="keep_base=False"):
        lift_ds.ReferenceModel(model)
    record = require_attachment(model).driver.changes
    assert (record.base, record.left, record.dense) == (None, None, {})


def test_steps_that_are_not_known_are_refused() -> None:
    model, optimizer = started("matrices")
    train(model, optimizer, "matrices", range(2))
    with pytest.raises(ValueError, match="since=3 is a step to come: 2 are applied"):
        lift_ds.changed_entries(model, 3)
    with pytest.raises(ValueError, match="since=-1: track_changes has recorded from step 0 on"):
        lift_ds.changed_entries(model, -1)


def test_detach_forgets() -> None:
    model, optimizer = started("matrices")
    train(model, optimizer, "matrices", range(3))
    record = require_attachment(model).driver.changes
    lift_ds.detach(model)
    assert record.base is None
    assert record.left is None
    for ask in (lift_ds.changed_entries, lift_ds.applied_steps, lambda model: lift_ds.base_weights(model).__enter__()):
        with pytest.raises(ValueError, match="LIFT is not attached"):
            ask(model)


def resumed(first: nn.Module, optimizer: lift_ds.LiftAdamW, folder: Path, **settings: Any) -> Any:
    """What goes on from a checkpoint of a run."""
    commit(first, folder)
    model = lift_ds.attach(build("llama"), config_of("llama", **settings), resume=True)
    again = lift_ds.LiftAdamW(model, lr=3e-2)
    model.load_state_dict(first.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    saved_changes.restore(model, folder)
    return model, again


def test_a_resume_goes_on_to_the_bit(tmp_path: Path) -> None:
    model, optimizer = started()
    train(model, optimizer, "llama", range(5))
    other, again = resumed(model, optimizer, tmp_path)
    train(model, optimizer, "llama", range(5, STEPS))
    train(other, again, "llama", range(5, STEPS))
    one, two = ([*lift_ds.changed_entries(found, 3)] for found in (model, other))
    assert [change[:2] for change in one] == [change[:2] for change in two]
    for mine, others in zip(one, two, strict=True):
        assert same_bits(mine.values, others.values)
        assert (mine.indices is None and others.indices is None) or torch.equal(mine.indices, others.indices)
    base = build("llama").state_dict()
    with lift_ds.base_weights(other):
        assert same(plain_of(other, base), base)


def test_settings_change_on_a_resume_as_far_as_they_can(tmp_path: Path, lift_log: list[str]) -> None:
    """Changes are tracked from there; the weights before training nobody has."""
    model, optimizer = started(keep_base=False, track_changes=False)
    train(model, optimizer, "llama", range(3))
    model, optimizer = resumed(model, optimizer, tmp_path)
    follower = plain_of(model, build("llama").state_dict())
    train(model, optimizer, "llama", range(3, 6))
    assert any("training goes on after step 3 without a record" in line for line in lift_log)
    patch(follower, model, 3)
    assert same(follower, plain_of(model, follower))
    with pytest.raises(ValueError, match="since=None: track_changes has recorded from step 3 on"):
        lift_ds.changed_entries(model)
    with pytest.raises(ValueError, match="without the record"), lift_ds.base_weights(model):
        pass
    model, optimizer = resumed(model, optimizer, tmp_path, keep_base=False, track_changes=False)
    train(model, optimizer, "llama", range(6, 7))
    record = require_attachment(model).driver.changes
    assert (record.base, record.left) == (None, None)


def test_a_checkpoint_without_the_base_is_refused_by_who_asks_for_it(tmp_path: Path) -> None:
    model, optimizer = started("matrices", keep_base=False)
    train(model, optimizer, "matrices", range(3))
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
    commit(model, tmp_path / "without")
    with pytest.raises(ValueError, match="saved with keep_base=False, this run has keep_base=True"):
        verify(started("matrices")[0], tmp_path / "without")
    verify(started("matrices", keep_base=False, track_changes=False)[0], tmp_path / "without")
    commit(started("matrices")[0], tmp_path / "with")
    verify(model, tmp_path / "with")


@pytest.mark.parametrize(("start", "stop", "columns"), [(7, 61, 10), (0, 0, 10), (20, 21, 10), (3, 400_000, 70_000)])
def test_entries_of_a_part_that_begins_and_ends_within_rows(start: int, stop: int, columns: int) -> None:
    part = Part(start, stop, columns, long=False)
    index = torch.arange(0, 420_000, 3, dtype=torch.int32)
    own = part.of(index)
    assert own.tolist() == [position for position in range(0, 420_000, 3) if start <= position < stop]
    some, others = own[::2].contiguous(), own[1::2].contiguous()
    entries = Entries.of(part, some, some.float()).with_more(others, others.float())
    assert torch.equal(entries.positions(), own)
    piece = torch.zeros(stop - start)
    before = entries.exchange(piece)
    assert not before.numbers.any()
    assert piece.nonzero().flatten().tolist() == [position - start for position in own.tolist() if position]
    assert torch.equal(before.exchange(piece).numbers, own.float())
    assert not piece.any()
    assert torch.equal(entries.without(some).positions(), others)
