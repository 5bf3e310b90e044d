"""Pins that each command that the documentation shows is one: programs, files and make targets exist, and what reads
the command line takes every flag. Of other people's programs only the name is known.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
from collections.abc import Callable

import pytest
from deepspeed.launcher.runner import parse_args as parse_deepspeed
from pages import PAGES, REPOSITORY, blocks

from benchmarks.methods.command import parse_arguments as parse_methods
from benchmarks.scaling.command import make_parser as make_study_parser
from lift_ds import cli, universal
from lift_ds.delta.command import make_apply_parser, make_export_parser, make_inspect_parser
from lift_ds.doctor.command import make_parser as make_doctor_parser
from lift_ds.evaluation.command import make_parser as make_evaluate_parser
from lift_ds.training.arguments import make_parser as make_train_parser

#: Programs that are not this project's.
FOREIGN = {"git", "cd", "pip", "hf", "export", "squeue", "scancel", "tail", "cat"}

#: What reads the command line of a subcommand of lift-ds that is not run here.
PARSERS = {
    "doctor": make_doctor_parser,
    "evaluate": make_evaluate_parser,
    "export": make_export_parser,
    "apply": make_apply_parser,
    "inspect": make_inspect_parser,
}

ASSIGNMENT = re.compile(r"[A-Z_]+=")


def commands(text: str) -> list[str]:
    """Return the commands of a block, continued lines joined."""
    joined = text.replace("\\\n", " ")
    return [part.strip() for line in joined.splitlines() for part in line.split("&&") if part.strip()]


COMMANDS = sorted({command for block in blocks("bash") for command in commands(block.text)})


def check_training(arguments: list[str]) -> None:
    """Check the flags of the shipped job."""
    values, _ = make_train_parser().read(arguments)
    assert values["deepspeed"] is None or (REPOSITORY / values["deepspeed"]).is_file()


def check_deepspeed(arguments: list[str]) -> None:
    launch = parse_deepspeed(arguments)
    if launch.user_script == "lift_ds.doctor":
        assert PARSERS["doctor"]().parse_args(launch.user_args)
        return
    assert launch.user_script == ("lift_ds.training" if launch.module else "launch/train.py")
    check_training(launch.user_args)


def check_python(arguments: list[str]) -> None:
    if arguments[0] == "-c":
        compile(arguments[1], "-c", "exec")
    elif arguments[:2] == ["-m", "lift_ds.universal"]:
        assert universal.main(arguments[2:]) == universal.REFUSED  # there are no such folders
    elif arguments[:2] == ["-m", "lift_ds.training"]:
        check_training(arguments[2:])
    elif arguments[0] == "launch/scaling_study.py":
        assert make_study_parser(None).parse_args(arguments[1:])
    elif arguments[:2] == ["-m", "benchmarks.methods"]:
        assert parse_methods(arguments[2:])
    else:
        assert arguments[0] == "-m"
        assert arguments[1].startswith("benchmarks."), arguments
        assert importlib.import_module(arguments[1]).parse_arguments(arguments[2:])


def check_make(arguments: list[str]) -> None:
    subprocess.run(["make", "--dry-run", *arguments], cwd=REPOSITORY, check=True, capture_output=True)


def check_lift_ds(arguments: list[str]) -> None:
    if arguments[0] == "train":
        check_training(arguments[1:])
    elif arguments[0] in PARSERS:
        assert PARSERS[arguments[0]]().parse_args(arguments[1:])
    else:
        assert cli.main(arguments) == 0


def check_pytest(arguments: list[str]) -> None:
    for path in arguments:
        assert (REPOSITORY / path).exists()


def check_mpiexec(arguments: list[str]) -> None:
    """Check what it starts."""
    program = arguments.index("python")
    assert arguments[program + 1] == "launch/train.py"
    check_training(arguments[program + 2 :])


def check_sbatch(arguments: list[str]) -> None:
    script = next(i for i, argument in enumerate(arguments) if argument.endswith(".sbatch"))
    check_script([arguments[script]], arguments[script + 1 :])


def check_script(script: list[str], arguments: list[str]) -> None:
    """Check a script of launch/ or benchmarks/, and the flags that those of launch/ pass on."""
    path = REPOSITORY / script[0]
    assert os.access(path, os.X_OK) or path.suffix == ".sbatch", path
    subprocess.run(["bash", "-n", str(path)], check=True)
    if script[0].startswith("launch/"):
        check_training(arguments)


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "deepspeed": check_deepspeed,
    "python": check_python,
    "make": check_make,
    "lift-ds": check_lift_ds,
    ".venv/bin/pytest": check_pytest,
    "sbatch": check_sbatch,
    "mpiexec": check_mpiexec,
}


def check_variables(names: list[str], program: str) -> None:
    """Check that a script of benchmarks/, or else launch/environment.sh, describes each of these variables."""
    script = program if program.startswith("benchmarks/") else "launch/environment.sh"
    described = (REPOSITORY / script).read_text().split("\nrepository=")[0]
    for name in names:
        assert re.search(rf"^# .*\b{name}\b", described, re.MULTILINE), name


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command, comments=True)
    variables = [word.split("=")[0] for word in words if ASSIGNMENT.match(word)]
    words = [word for word in words if not ASSIGNMENT.match(word)]
    program, arguments = words[0], words[1:]
    if program in FOREIGN:
        return
    check_variables(variables, program)
    if program in CHECKS:
        CHECKS[program](arguments)
    else:
        check_script([program], arguments)


def test_every_program_that_is_documented_is_seen() -> None:
    programs = {shlex.split(command, comments=True)[0] for command in COMMANDS}
    assert programs >= {"make", "deepspeed", "lift-ds", "python"}


def test_no_command_hides_in_an_indented_block() -> None:
    hidden = re.compile(r"\n\n    (make|deepspeed|python|lift-ds|launch/|accelerate|sbatch|[A-Z_]+=)")
    assert not [page.name for page in PAGES if hidden.search(page.read_text())]
