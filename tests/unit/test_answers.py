"""Pins what counts as the answer of a generated text: its last number, the letter of a choice, the first legal label.

Each awkward case is decided here. Where the published evaluation would read it otherwise, the line says so.
"""

from __future__ import annotations

import pytest

from lift_ds.evaluation.answers import first_label, is_number, last_number, letter, same_number

NUMBERS = {
    # thousands, and lists that only look like them
    "1,234,567": 1234567,
    "12,345.6 in all": 12345.6,
    "1,2,3": 3,  # a list; published: 123
    "1,234,56": 56,  # no thousands
    # signs
    "-5": -5,
    "= -5": -5,
    "x=-3": -3,
    "(-3)": -3,
    "\N{MINUS SIGN}7": -7,
    "-$5": -5,
    "$-5": -5,
    "10-5": 5,  # a difference; published: -5
    "10 - 5": 5,
    # decimals, and the full stop of a sentence
    "12.50": 12.5,
    ".5": 0.5,  # published: 5
    "5.": 5,
    "it is 12.": 12,
    "12...": 12,
    "1.2.3": 3,  # a version is no number
    # fractions; published: the number after the slash
    "3/4": 0.75,
    "is 3/4.": 0.75,
    "1 1/2": 1.5,
    "-1 1/2": -1.5,
    "18/3 = 6": 6,
    "$3.50/hour": 3.5,
    "1/2/2020": 2020,  # a date is no fraction
    # units
    "$1,234.50": 1234.5,
    "50%": 50,
    "5km": 5,
    "the 3rd": 3,
    "at 12:30": 30,  # a time is two numbers
    "H2O": 2,
    # powers
    "1.5e3": 1500,
    "1e-3": 0.001,
    "2e": 2,
    "2 x 10^3": 2000,
    r"2.5 \times 10^{-2}": 0.025,
    "5^2": 2,  # not worked out
    # several
    "3 apples and 4 pears": 4,
    "The answer is 7. I checked it 2 times": 2,
    "12, no, 13": 13,
}


@pytest.mark.parametrize(("text", "number"), NUMBERS.items(), ids=list(NUMBERS))
def test_the_last_number(text: str, number: float) -> None:
    assert last_number(text) == pytest.approx(number)


@pytest.mark.parametrize("text", ["", "none", "five", "-", ".", "3/0", "1e999"])
def test_no_number(text: str) -> None:
    assert last_number(text) is None


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("so 576", "576.0", True),
        ("so 1,000", "1000", True),
        ("0.3333", "0.333", True),  # within 0.001
        ("0.335", "0.333", False),
        ("nothing", "0", False),
    ],
)
def test_numbers_are_the_same_within_a_thousandth(text: str, answer: str, right: bool) -> None:
    assert same_number(text, answer) is right


@pytest.mark.parametrize(
    ("text", "number"),
    [("8.0", True), ("1,000", True), ("-2", True), ("8 apples", False), ("A", False), ("nan", False), ("inf", False)],
)
def test_an_answer_is_compared_by_its_value_only_where_it_is_a_number(text: str, number: bool) -> None:
    assert is_number(text) is number


LETTERS = {
    # in brackets: the last
    "The answer is (C).": "C",
    "(A) is wrong, so (b)": "B",
    "( D )": "D",
    # named
    "the answer is B": "B",
    "Answer: D": "D",
    "ANSWER: B": "B",
    "Answer is b) 3": "B",
    'the answer is: "B"': "B",
    "The correct option is **E**": "E",
    "option c": "C",
    "the answer is a.": "A",
    "answer A or rather answer B": "B",
    # standing alone
    "B": "B",
    "b": "B",
    "B.": "B",
    "I'd say D.": "D",
    r"\boxed{D}": "D",
    "A": "A",
    "A train goes to B": "B",  # published: A
    "Because of that, E": "E",  # published: B
}


@pytest.mark.parametrize(("text", "found"), LETTERS.items(), ids=list(LETTERS))
def test_the_letter_of_a_choice(text: str, found: str) -> None:
    assert letter(text) == found


@pytest.mark.parametrize("text", ["", "nothing", "A man walks", "item(s)", "f(a) = 3", "the answer is a number", "(F)"])
def test_no_letter(text: str) -> None:
    assert letter(text) is None


@pytest.mark.parametrize(
    ("text", "labels", "found"),
    [
        ("the correct answer is answer3", ("answer1", "answer2", "answer3"), "answer3"),
        ("answer2, not answer1", ("answer1", "answer2"), "answer2"),
        ("Answer2: a forest", ("answer1", "answer2"), "answer2"),
        ("answer12", ("answer1", "answer2"), None),
        ("True.", ("true", "false"), "true"),
        ("it is untrue", ("true", "false"), None),
        ("it is false, not true", ("true", "false"), "false"),
        ("", ("true", "false"), None),
    ],
)
def test_the_first_legal_label(text: str, labels: tuple[str, ...], found: str | None) -> None:
    assert first_label(text, labels) == found
