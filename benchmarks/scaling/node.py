"""One node of a job: its ranks, from their start until none is left.

python -m benchmarks.scaling.node FOLDER --node I --address NAME
"""

from __future__ import annotations

import argparse
import json
import os
import select
import socket
import sys
from pathlib import Path

#: What is to be run, in the folder of a job; see `job`.
JOB = "job.json"


def main(arguments: list[str] | None = None) -> int:
    """Run the ranks of this node; 0 when all of them have done their work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--node", type=int, required=True, help="number of this node, from 0")
    parser.add_argument("--address", default=socket.gethostname(), help="of the first node, where the ranks meet")
    parser.add_argument("--watch_stdin", action="store_true", help="end when the standard input does")
    args = parser.parse_args(arguments)
    os.environ |= json.loads((args.folder / JOB).read_text())["environment"]
    # Only now: torch and DeepSpeed read the environment when they are imported.
    from benchmarks.measure.ranks import Node, RankError, run_on_node
    from benchmarks.scaling.job import note_failure, note_result, read_job
    from benchmarks.scaling.worker import work

    job = read_job(args.folder)
    node = Node(job.cell.ranks, job.cell.nodes, args.node, args.address, job.port)
    wanted = stdin_is_open if args.watch_stdin else lambda: True
    try:
        found = run_on_node(work, (job,), node, args.folder, job.device, job.limit, wanted)
    except RankError as error:
        if wanted():  # else another node was first
            note_failure(args.folder, str(error))
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.node == 0:
        note_result(args.folder, found[0])
    return 0


def stdin_is_open() -> bool:
    """Tell whether whoever holds the other end of the standard input is still there."""
    return not select.select([sys.stdin], [], [], 0)[0] or bool(os.read(sys.stdin.fileno(), 1))


if __name__ == "__main__":
    sys.exit(main())
