"""The command `lift-ds`.

    lift-ds plan --model 7B --nodes 1 --gpus-per-node 8 --gpu-memory 80
    lift-ds doctor --output-dir /shared/run
    lift-ds train --model_name_or_path MODEL --train_file rows.json --output_dir tuned
    lift-ds evaluate tuned --tasks lift_gsm8k,arc_easy
    lift-ds export MODEL tuned --output delta.safetensors
    lift-ds apply MODEL delta.safetensors --output tuned_again

The libraries of a command are imported when it is run.
"""

from __future__ import annotations

import argparse
import importlib
import sys

#: Command -> (module and function that takes what follows it, what it is for).
_COMMANDS = {
    "plan": ("lift_ds.planner.command:main", "memory, network and time of a run, from the model's configuration alone"),
    "doctor": ("lift_ds.doctor.command:main", "what is wrong with the nodes of a job, before a model loads"),
    "evaluate": ("lift_ds.evaluation.command:main", "tasks, loss and KL divergence of a trained model"),
    "train": ("lift_ds.training.command:main", "fine-tune a causal language model with LIFT, in full, or with LoRA"),
    "export": ("lift_ds.delta.command:export", "write what training changed in a model as a file"),
    "apply": ("lift_ds.delta.command:apply", "write the tuned model again, from its base and such files"),
    "inspect": ("lift_ds.delta.command:inspect", "check such a file, and say what it changes"),
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
        module, function = _COMMANDS[arguments[0]][0].split(":")
        return int(getattr(importlib.import_module(module), function)(arguments[1:]))
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
