"""Skills whose answers are computed, for tasks that no pretrained model has seen: rows of a question and its steps.

    python -m benchmarks.methods.skill addition --rows 1000 --seed 0 --output rows.json

A row is {"instruction", "input" (empty), "output", "answer"}, or {"prompt", "completion", "answer"}. The output, or
completion, shows the steps; its last number is the answer. The parts of a split share no question.
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


def later_date(draw: random.Random) -> Row:
    """Say which date comes some days after another one, in a year that is no leap year. The prompt has no frame."""
    month = draw.randrange(12)
    (name, days), (next_name, _) = _MONTHS[month], _MONTHS[(month + 1) % 12]
    day, later = draw.randint(1, days), draw.randint(5, 28)
    total = day + later
    steps, answer = f"{day} + {later} = {total}. {name} has {days} days.", f"{name} {total}"
    if total > days:
        steps, answer = f"{steps} {total} - {days} = {total - days}.", f"{next_name} {total - days}"
    return {
        "prompt": f"Which date is {later} days after {name} {day}?\n",
        "completion": f"{steps} The answer is {answer}.",
        "answer": answer.split()[1],
    }


SKILLS: dict[str, Callable[[random.Random], Row]] = {
    "addition": addition,
    "units": units,
    "later_date": later_date,
}


def question_of(row: Row) -> str:
    """Return what a row asks."""
    return row.get("prompt") or row["instruction"]


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
        question = question_of(row)
        in_vain = in_vain + 1 if question in found else 0
        if in_vain > 1000:
            raise ValueError(f"--rows {count}: of the skill {skill!r} no more than {len(found)} questions were found")
        found.setdefault(question, row)
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
    print(f"written to {args.output}: {len(rows)} rows, the first:\n{json.dumps(rows[0], indent=1)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
