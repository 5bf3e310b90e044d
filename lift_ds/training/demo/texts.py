"""Two kinds of generated English: little stories, for a base model, and word problems, for a new task.

Both are drawn from a seeded generator and share people, things and numbers, so that a base model that has
seen only the stories knows the words of the problems, as a real base model would, but not how to solve them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TypeVar

_PEOPLE = (
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jonas", "Kate", "Leo",
    "Maria", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tina", "Victor",
)  # fmt: skip
_THINGS = (
    "apples", "books", "cards", "coins", "cups", "eggs", "flowers", "keys", "lamps", "letters", "nuts",
    "oranges", "pencils", "plates", "shells", "stamps", "stones", "tickets",
)  # fmt: skip
_PLACES = (
    "the market", "the school", "the river", "the old mill", "the library", "the garden", "the harbour",
    "the station", "the small shop", "the forest",
)  # fmt: skip
_WEATHER = ("sunny", "rainy", "windy", "cold", "warm", "foggy")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_ANIMALS = ("a cat", "a dog", "a horse", "a goat", "a duck", "an owl", "a rabbit")
_COLOURS = ("red", "blue", "green", "yellow", "white", "brown", "black")
_JOBS = ("teacher", "baker", "doctor", "farmer", "painter", "driver", "singer", "builder")
_TOWNS = ("Alton", "Brook", "Carden", "Dunmore", "Elmsea", "Farley", "Greyford", "Hollis")

Problem = dict[str, str]
T = TypeVar("T")


def story(rng: random.Random) -> str:
    """Tell one little story of four to six sentences.

    Args:
        rng: the source of every choice.

    Returns:
        The story, one paragraph.
    """
    hero, friend = rng.sample(_PEOPLE, 2)
    thing, place, day = rng.choice(_THINGS), rng.choice(_PLACES), rng.choice(_DAYS)
    count, age = rng.randint(2, 60), rng.randint(6, 80)
    sentences = [
        rng.choice(
            (
                f"{hero} is a {rng.choice(_JOBS)} in {rng.choice(_TOWNS)} and is {age} years old.",
                f"On {day} the weather in {rng.choice(_TOWNS)} was {rng.choice(_WEATHER)}, and {hero} was glad.",
                f"{hero} was {age} years old and lived near {place}.",
            )
        ),
        rng.choice(
            (
                f"On {day} {hero} walked to {place} with {friend}.",
                f"{hero} met {friend} at {place} in the morning.",
                f"Every {day} {hero} and {friend} went to {place} together.",
            )
        ),
        rng.choice(
            (
                f"There they found {count} {rng.choice(_COLOURS)} {thing} under a tree.",
                f"{friend} showed {hero} a box with {count} {thing}.",
                f"They saw {rng.choice(_ANIMALS)} that was sleeping beside {count} {thing}.",
            )
        ),
        rng.choice(
            (
                f"{hero} took the {thing} home and put them on the table.",
                f"{friend} said that the {thing} were very old.",
                f"They gave the {thing} to {rng.choice(_PEOPLE)}, who was very happy.",
            )
        ),
    ]
    extra = [
        f"It was {rng.choice(_WEATHER)} and {rng.choice(_WEATHER)} all day.",
        f"Later {friend} bought {rng.choice(_ANIMALS)} for {rng.randint(2, 90)} coins.",
        f"In the evening {hero} read a book about {rng.choice(_TOWNS)}.",
    ]
    return " ".join(sentences + rng.sample(extra, rng.randint(0, 2)))


def _gain(rng: random.Random, who: str, other: str, thing: str) -> tuple[str, str, int]:
    have, more = rng.randint(2, 60), rng.randint(2, 39)
    total = have + more
    return (
        f"{who} has {have} {thing}. {other} gives {who} {more} more. How many {thing} does {who} have now?",
        f"{who} has {have} {thing} and gets {more} more. {have} + {more} = {total}.",
        total,
    )


def _loss(rng: random.Random, who: str, other: str, thing: str) -> tuple[str, str, int]:
    have = rng.randint(10, 90)
    less = rng.randint(2, have - 2)
    rest = have - less
    return (
        f"{who} has {have} {thing} and gives {less} of them to {other}. How many {thing} are left?",
        f"{who} has {have} {thing} and gives away {less}. {have} - {less} = {rest}.",
        rest,
    )


def _product(rng: random.Random, who: str, other: str, thing: str) -> tuple[str, str, int]:
    boxes, each = rng.randint(2, 9), rng.randint(2, 9)
    total = boxes * each
    return (
        f"{who} buys {boxes} boxes for {other}. There are {each} {thing} in each box. "
        f"How many {thing} are there in all?",
        f"There are {boxes} boxes with {each} {thing} each. {boxes} * {each} = {total}.",
        total,
    )


_PROBLEMS: tuple[Callable[[random.Random, str, str, str], tuple[str, str, int]], ...] = (_gain, _loss, _product)


def problem(rng: random.Random) -> Problem:
    """Set one arithmetic word problem.

    Args:
        rng: the source of every choice.

    Returns:
        A row with instruction, input (empty), output (the worked solution) and answer, all strings.
    """
    who, other = rng.sample(_PEOPLE, 2)
    question, working, answer = rng.choice(_PROBLEMS)(rng, who, other, rng.choice(_THINGS))
    return {
        "instruction": question,
        "input": "",
        "output": f"{working} The answer is {answer}.",
        "answer": str(answer),
    }


def stories(count: int, seed: int) -> list[str]:
    """Return `count` different stories; the same seed gives the same ones."""
    return _distinct(count, seed, story, key=lambda text: text)


def problems(count: int, seed: int) -> list[Problem]:
    """Return `count` different problems; the same seed gives the same ones."""
    return _distinct(count, seed, problem, key=lambda row: row["instruction"])


def _distinct(count: int, seed: int, draw: Callable[[random.Random], T], key: Callable[[T], str]) -> list[T]:
    # Distinct, so that a held-out part taken from the end shares no row with the part trained on.
    rng = random.Random(seed)
    found: dict[str, T] = {}
    while len(found) < count:
        row = draw(rng)
        found.setdefault(key(row), row)
    return list(found.values())
