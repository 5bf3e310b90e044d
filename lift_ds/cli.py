"""The command `lift-ds`.

    lift-ds plan --model 7B --nodes 1 --gpus-per-node 8 --gpu-memory 80
    lift-ds train --model_name_or_path MODEL --train_file rows.json --output_dir tuned
    lift-ds evaluate tuned --tasks lift_gsm8k,arc_easy

The libraries of a command are imported when it is run.
"""

from __future__ import annotations

import argparse
import importlib
import sys

#: Command -> (module whose `main` takes what follows it, what it is for).
_COMMANDS = {
    "plan": ("lift_ds.planner.command", "memory, network and time of a run, from the model's configuration alone"),
    "evaluate": ("lift_ds.evaluation.command", "tasks, loss and KL divergence of a trained model"),
    "train": ("lift_ds.training.command", "fine-tune a causal language model with LIFT, in full, or with LoRA"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: of the command line; those of the process where None.

    Returns:
        The exit code: 0, or 2 where an argument cannot be used.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in _COMMANDS:
        module, _ = _COMMANDS[arguments[0]]
        return int(importlib.import_module(module).main(arguments[1:]))
    _parser().parse_args(arguments)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lift-ds", description="LIFT sparse fine-tuning on DeepSpeed.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (_, text) in _COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser


if __name__ == "__main__":
    sys.exit(main())
