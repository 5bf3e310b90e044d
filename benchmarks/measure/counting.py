"""Counting, not estimating: every tensor storage that lives and every collective that runs in a process.

Both are read off torch's dispatcher, through which all of them pass whoever calls: optimizers, autograd, and for
collectives DeepSpeed's own comm layer, plain `torch.distributed` and DDP's gradient buckets, which all end in an
operator of the namespace `c10d`.

    memory    a storage counts from the first operator that yields or takes it until it is freed (weak references, so
              also what only autograd holds counts). Not seen: scratch memory inside one kernel or in the backend. The
              peak of a step agreed to 0.1% with the events of torch's allocator (torch.profiler, profile_memory).
    network   a collective counts by its kind, its logical bytes and the bytes a rank receives:

              kind             logical bytes: the whole tensor            received per rank, ring, N ranks
              all_gather       what it yields                             (N - 1)/N
              reduce_scatter   what it takes                              (N - 1)/N
              all_reduce       what it takes                              2 (N - 1)/N
              broadcast, reduce, scatter                                  (N - 1)/N, mean over the ranks
              gather                                                      (N - 1)/N on the root, nothing elsewhere
              all_to_all       what a rank receives from others           1
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from lift_ds.planner.formulas import ring_share

#: Operator of torch -> (kind, number of the argument whose tensors are the whole of it).
_COLLECTIVES = {
    "c10d::allgather_": ("all_gather", 0),
    "c10d::_allgather_base_": ("all_gather", 0),
    "c10d::allgather_coalesced_": ("all_gather", 0),
    "c10d::allgather_into_tensor_coalesced_": ("all_gather", 0),
    "c10d::reduce_scatter_": ("reduce_scatter", 1),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "c10d::allreduce_": ("all_reduce", 0),
    "c10d::allreduce_coalesced_": ("all_reduce", 0),
    "c10d::broadcast_": ("broadcast", 0),
    "c10d::reduce_": ("reduce", 0),
    "c10d::gather_": ("gather", 1),
    "c10d::scatter_": ("scatter", 0),
    "c10d::alltoall_": ("all_to_all", 1),
    "c10d::alltoall_base_": ("all_to_all", 0),
    "c10d::send": ("send", 0),
    "c10d::recv_": ("receive", 0),
}
#: One rank passes only its part: the whole is as many times that as there are ranks.
_PART_OF_WHOLE = {"gather", "scatter"}
_WITHOUT_PAYLOAD = {"c10d::barrier", "c10d::monitored_barrier_", "c10d::check_for_nan"}
_COMMUNICATING = ("c10d", "_c10d_functional", "symm_mem", "deepspeed")


def tensors_in(thing: Any) -> Iterator[Tensor]:
    """Yield the tensors in an argument or result of an operator."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, (list, tuple)):
        for part in thing:
            yield from tensors_in(part)


@dataclass
class Window:
    """What was counted while it was open.

    Attributes:
        start_bytes: alive when it opened.
        peak_bytes: the most that was alive at once beyond `start_bytes`.
        peak_by_origin: at that moment the bytes beyond the start by origin, "phase operator"; origins whose bytes fell
            (gradients that the optimizer replaced, say) are negative.
        peak_by_phase: phase -> the most that was alive at once beyond `start_bytes` while it lasted.
        logical: kind of collective -> logical bytes.
        received: kind of collective -> bytes this rank receives by a ring algorithm.
        calls: kind of collective -> how many.
    """

    start_bytes: int
    start_by_origin: Counter[str]
    peak_bytes: int = 0
    peak_by_origin: Counter[str] = field(default_factory=Counter)
    peak_by_phase: Counter[str] = field(default_factory=Counter)
    logical: Counter[str] = field(default_factory=Counter)
    received: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)

    def largest_origins(self, count: int = 8) -> dict[str, int]:
        """Return what the peak was made of, largest first."""
        return dict(self.peak_by_origin.most_common(count))


class Ledger(TorchDispatchMode):
    """Keeps account of live storages and of collectives while it is active; windows read it.

    Args:
        ranks: how many take part in the collectives.

    Attributes:
        phase: what the process is doing now, by the word of the caller; part of a storage's origin.
        live_bytes: of all storages seen that are alive.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self._ranks = ranks
        self._known: dict[weakref.ref[Any], tuple[int, str]] = {}
        self._windows: list[Window] = []
        self._by_origin: Counter[str] = Counter()
        self.phase = "setup"
        self.live_bytes = 0

    @contextmanager
    def window(self) -> Iterator[Window]:
        """Count apart what happens within the context."""
        window = Window(self.live_bytes, self._by_origin.copy())
        self._windows.append(window)
        try:
            yield window
        finally:
            self._windows.remove(window)

    def live_storages(self) -> list[torch.UntypedStorage]:
        """Return every storage that was seen and is alive."""
        return [storage for reference in list(self._known) if (storage := reference()) is not None]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name.partition("::")[0] in _COMMUNICATING:
            self._note_collective(name, args)
        result = func(*args, **kwargs)
        origin = f"{self.phase} {name.partition('::')[2]}"
        for thing in (args, tuple(kwargs.values()), result):
            for tensor in tensors_in(thing):
                self._note_storage(tensor, origin)
        return result

    def _note_storage(self, tensor: Tensor, origin: str) -> None:
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        known, first_origin = self._known.get(reference := weakref.ref(storage, self._forget), (None, origin))
        if known is None:
            self._known[reference] = (size, origin)
        elif known != size:  # resized in place
            self._known[reference] = (size, first_origin)
        self._change(size - (known or 0), first_origin)

    def _forget(self, reference: weakref.ref[Any]) -> None:
        size, origin = self._known.pop(reference, (0, ""))
        self._change(-size, origin)

    def _change(self, size: int, origin: str) -> None:
        if not size:
            return
        self.live_bytes += size
        self._by_origin[origin] += size
        if size < 0:
            return
        for window in self._windows:
            beyond = self.live_bytes - window.start_bytes
            window.peak_by_phase[self.phase] = max(window.peak_by_phase[self.phase], beyond)
            if beyond > window.peak_bytes:
                window.peak_bytes = beyond
                window.peak_by_origin = self._by_origin.copy()
                window.peak_by_origin.subtract(window.start_by_origin)

    def _note_collective(self, name: str, args: tuple[Any, ...]) -> None:
        if name in _WITHOUT_PAYLOAD:
            return
        kind, whole = _COLLECTIVES.get(name, (f"unknown {name}", 0))
        size = sum(tensor.nbytes for tensor in tensors_in(args[whole]))
        if kind in _PART_OF_WHOLE:
            size *= self._ranks
        share = {"send": 0.0, "receive": 1.0}.get(kind, ring_share(kind, self._ranks))
        if name == "c10d::alltoall_base_" and args[3]:  # parts of unequal sizes, of which one stays here
            size, share = size - size * args[3][dist.get_rank()] // max(1, sum(args[3])), 1.0
        receives = kind != "gather" or any(True for _ in tensors_in(args[0]))  # only the root passes outputs
        for window in self._windows:
            window.calls[kind] += 1
            if kind != "receive":  # it was counted where it was sent
                window.logical[kind] += size
            window.received[kind] += round(size * share) * receives


def walk_storages() -> list[torch.UntypedStorage]:
    """Return the storages of every tensor that Python's garbage collector knows, and of their gradients."""
    gc.collect()
    found: dict[int, torch.UntypedStorage] = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor) and thing.device.type != "meta":
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and tensor.layout is torch.strided:
                    found.setdefault(tensor.untyped_storage()._cdata, tensor.untyped_storage())
    return list(found.values())


def bytes_by_category(
    storages: Iterable[torch.UntypedStorage], categories: Iterable[tuple[str, Iterable[Tensor]]], rest: str
) -> dict[str, int]:
    """Sort storages into categories, each counted once.

    Args:
        storages: what is alive.
        categories: (name, tensors that belong to it); the first that claims a storage has it.
        rest: name of the category of those nobody claims.

    Returns:
        Category -> bytes, every category present.
    """
    owner: dict[int, str] = {}
    totals = {rest: 0}
    for name, tensors in categories:
        totals.setdefault(name, 0)
        for tensor in tensors:
            owner.setdefault(tensor.untyped_storage()._cdata, name)
    for cdata, size in {storage._cdata: storage.nbytes() for storage in storages}.items():
        totals[owner.get(cdata, rest)] += size
    return totals


def allocated_peak(action: Callable[[], object]) -> int:
    """Run an action and return the most bytes that torch's allocator on the CPU held at a time for it.

    Counted are the events of the allocator, which has also the workspaces of torch's linear algebra; not what the
    libraries below it (MKL, the runtime of the threads) allocate for themselves.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        action()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert peak > 0, "nothing was recorded"
    return peak
