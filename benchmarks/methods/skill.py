"""Skills whose answers are computed, for tasks that no pretrained model has seen: rows of a question and its steps.

    python -m benchmarks.methods.skill addition --rows 1000 --seed 0 --output rows.json

A row is {"instruction", "input" (empty), "output", "answer"}. The output shows the steps; its last number is the
answer. The parts of a split share no question.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

Row = dict[str, str]

_MONTHS = (
    ("January", 31), ("February", 28), ("March", 31), ("April", 30), ("May", 31), ("June", 30), ("July", 31),
    ("August", 31), ("September", 30), ("October", 31), ("November", 30), ("December", 31),
)  # fmt: skip


def _row(question: str, steps: str, answer: int) -> Row:
    return {"instruction": question, "input": "", "output": f"{steps} The answer is {answer}.", "answer": str(answer)}


def addition(draw: random.Random) -> Row:
    """Add two numbers of three or four digits, from the last digit on, with what is carried."""
    first, second = (draw.randint(100, 9999) for _ in range(2))
    total, carried, steps = first + second, 0, []
    for place in range(len(str(max(first, second)))):
        one, other = (number // 10**place % 10 for number in (first, second))
        added = f"{one} + {other}" + (f" + {carried}" if carried else "")
        sum_ = one + other + carried
        carried = sum_ // 10
        steps.append(f"{added} = {sum_}{', carry 1' if carried else ''}.")
    return _row(f"Add {first} and {second}.", " ".join(steps), total)


def units(draw: random.Random) -> Row:
    """Convert days, hours and minutes to minutes."""
    days, hours, minutes = draw.randint(2, 9), draw.randint(2, 23), draw.randint(2, 59)
    whole = 24 * days + hours
    question = f"How many minutes are {days} days, {hours} hours and {minutes} minutes?"
    steps = (
        f"{days} * 24 = {24 * days}. {24 * days} + {hours} = {whole} hours. {whole} * 60 = {60 * whole}. "
        f"{60 * whole} + {minutes} = {60 * whole + minutes}."
    )
    return _row(question, steps, 60 * whole + minutes)


def dates(draw: random.Random) -> Row:
    """Count the days between two dates of one year that is no leap year."""
    first, second = sorted(draw.sample(range(1, 366), 2))
    (name, day, before), (later_name, later_day, later_before) = (_month_and_day(place) for place in (first, second))
    question = f"In a year that is no leap year, how many days after {name} {day} is {later_name} {later_day}?"
    steps = (
        f"{name} {day} is day {before} + {day} = {first}. {later_name} {later_day} is day {later_before} + {later_day} "
        f"= {second}. {second} - {first} = {second - first}."
    )
    return _row(question, steps, second - first)


def _month_and_day(place: int) -> tuple[str, int, int]:
    """Return month, day, and the days before that month, of a day of the year from 1 on."""
    before = 0
    for name, days in _MONTHS:
        if place <= before + days:
            return name, place - before, before
        before += days
    raise AssertionError(place)


SKILLS: dict[str, Callable[[random.Random], Row]] = {"addition": addition, "units": units, "dates": dates}


def rows_of(skill: str, count: int, seed: int) -> list[Row]:
    """Return rows with different questions; the same seed gives the same ones.

    Args:
        skill: name in SKILLS.
        count: how many rows.
        seed: of every choice.

    Raises:
        ValueError: there is no such skill, or it does not have so many questions.
    """
    if skill not in SKILLS:
        raise ValueError(f"skill {skill!r} is not one of {', '.join(SKILLS)}")
    draw, found, in_vain = random.Random(f"{skill} {seed}"), dict[str, Row](), 0
    while len(found) < count:
        row = SKILLS[skill](draw)
        in_vain = in_vain + 1 if row["instruction"] in found else 0
        if in_vain > 1000:
            raise ValueError(f"--rows {count}: of the skill {skill!r} no more than {len(found)} questions were found")
        found.setdefault(row["instruction"], row)
    return list(found.values())


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("skill", choices=SKILLS)
    parser.add_argument("--rows", type=int, required=True, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same rows (0)")
    parser.add_argument("--output", type=Path, required=True, help="a JSON array")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Write the rows."""
    args = parse_arguments(arguments)
    try:
        rows = rows_of(args.skill, args.rows, args.seed)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(f"written to {args.output}: {len(rows)} rows, the first:\n{rows[0]['instruction']}\n{rows[0]['output']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
