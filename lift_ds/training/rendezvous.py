"""The start of a run on several ranks: all of them meet within a time limit, and see the same output folder.

torch.distributed alone waits half an hour for a rank that does not come. Where the port is taken, only the rank that
cannot open it reports an error, and the others wait for whatever answers there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from lift_ds.runtime.ports import free_port
from lift_ds.runtime.ranks import by_main, rank_and_count, together

if TYPE_CHECKING:
    from transformers import TrainingArguments

#: Environment variable with the seconds within which all ranks have to meet, and the seconds without it.
LIMIT, _DEFAULT_LIMIT = "LIFT_DS_MEETING_SECONDS", "300"

#: Seconds within which a file of rank 0 has to appear on the other nodes. Network file systems can be late.
_APPEARS = 10.0

# Rank 0 serves the store; torch.distributed finds and uses the one that is open already.
_store: dist.Store | None = None


def meet() -> None:
    """Wait until all ranks have come, for a limited time; all ranks call, before torch.distributed begins.

    Raises:
        ValueError: the port is taken, rank 0 is out of reach, or some rank has not come; says which.
    """
    global _store
    rank, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    limit = meeting_limit()
    deadline = time.monotonic() + limit
    _store = open_store(address, port, count, serves_store(), limit)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    keys = [f"lift_ds/came/{attempt}/{other}" for other in range(count)]
    try:
        _store.set(keys[rank], socket.gethostname())
        _store.wait(keys, timedelta(seconds=max(deadline - time.monotonic(), 1)))
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{_absent(_store, keys)} not come to {address}:{port} within {limit:g} s ({LIMIT})"
        ) from error


def serves_store() -> bool:
    """Tell whether this rank is the one that opens the port where all meet."""
    # torchrun's agent of the first node serves the store itself.
    return os.environ.get("RANK") == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def open_store(address: str, port: int, count: int, serves: bool, limit: float) -> dist.TCPStore:
    """Open the store through which ranks exchange words before they have a process group.

    Args:
        address: where it is served.
        port: the same.
        count: how many processes come.
        serves: whether this process serves it.
        limit: seconds to wait for it, and for what is asked of it.

    Raises:
        ValueError: the port is taken, or nothing answers there within the limit.
    """
    try:
        return dist.TCPStore(
            address, port, count, serves, timedelta(seconds=limit), wait_for_workers=False, multi_tenant=True
        )
    except (RuntimeError, ValueError) as error:
        if serves and _is_taken(port):
            raise ValueError(
                f"port {port} of {socket.gethostname()}, where the ranks are to meet, is in use by another process; "
                "name another one: PORT=... for the scripts of launch/, --master_port for deepspeed"
            ) from error
        raise ValueError(f"{this_process()} does not reach rank 0 at {address}:{port} within {limit:g} s") from error


def _absent(store: dist.Store, keys: list[str]) -> str:
    try:
        ranks = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
    except (RuntimeError, ValueError):  # rank 0 has left, and its store with it
        return "some ranks have"
    return f"rank {ranks[0]} has" if len(ranks) == 1 else f"ranks {', '.join(ranks)} of {len(keys)} have"


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def this_process() -> str:
    """Return what to call this process in an error."""
    rank = os.environ.get("RANK")
    return f"{'a process' if rank is None else f'rank {rank}'} on {socket.gethostname()}"


def meeting_limit() -> float:
    """Return the seconds within which all ranks have to meet.

    Raises:
        ValueError: the environment variable is no number above 0.
    """
    text = os.environ.get(LIMIT, _DEFAULT_LIMIT)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if seconds <= 0:
        raise ValueError(f"{LIMIT}={text!r} is not a number of seconds above 0")
    return seconds


def check_same_folder(output_dir: str) -> None:
    """Check that every rank sees the folder that all of them write checkpoints to; all ranks call, two all-gathers.

    Args:
        output_dir: the run's folder; where it does not exist it is made for as long as this takes.

    Raises:
        ValueError: a rank does not see what rank 0 wrote there.
    """
    rank, count = rank_and_count()
    if count == 1:
        return
    folder = Path(output_dir)
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    mark = by_main(lambda: leave_mark(folder))
    try:
        together(lambda: _find_mark(folder / mark))
    finally:
        if rank == 0:
            (folder / mark).unlink(missing_ok=True)
            for path in absent:  # a run that is refused after this leaves no folder
                with contextlib.suppress(OSError):
                    path.rmdir()


def leave_mark(folder: Path) -> str:
    """Write an empty file that the other nodes look for, in a folder that is made where it is missing.

    Returns:
        The file's name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f".seen-{uuid.uuid4().hex}"
    (folder / name).touch()
    return name


def sees_mark(mark: Path) -> bool:
    """Tell whether this process sees the file that another node has written; waits some seconds for it."""
    deadline = time.monotonic() + _APPEARS
    while not mark.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _find_mark(mark: Path) -> None:
    if not sees_mark(mark):
        raise ValueError(
            f"--output_dir {str(mark.parent)!r} is not the same folder on all nodes: {this_process()} does not see "
            "what rank 0 wrote there; name one on storage that all nodes share"
        )


def limit_collectives(seconds: float) -> None:
    """Give the collectives of the run their limit; on CPUs the Trainer does not hand `ddp_timeout` on.

    Args:
        seconds: after which a collective whose peers do not answer is an error.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def check_batch(args: TrainingArguments) -> None:
    """Check that the DeepSpeed file fits the number of ranks and the flags, as far as it fixes anything.

    Args:
        args: has read the file.

    Raises:
        ValueError: they contradict each other; names each setting with both values.
    """
    mismatches = args.hf_deepspeed_config.mismatches if args.deepspeed else []
    if mismatches:
        found = "; ".join(text.removeprefix("- ds ").replace(" vs hf ", " where the run has ") for text in mismatches)
        found = found.replace(" (calculated)", "")
        raise ValueError(
            f"the DeepSpeed file does not match this run on {args.world_size} rank(s): {found}. "
            'Change one of the two, or write "auto" into the file'
        )


def be_one_rank() -> None:
    """Make a process that no launcher has started the only rank of a run with DeepSpeed."""
    if "RANK" in os.environ:
        return
    port = str(free_port())
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
