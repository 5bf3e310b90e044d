"""What a generated text answers: a number, a letter or a label. Pure functions of the text.

The published evaluation of LIFT takes the last number of the text with commas removed, the first capital A to E, and
the first legal label. Numbers and labels are read here by the same rules, with the awkward cases settled. Letters are
not: the first capital finds the "A" of "A train ...".
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

#: A number counts as right within this distance of the answer.
TOLERANCE = 0.001

_THOUSANDS = re.compile(r"(?<![0-9])([0-9]{1,3}(?:,[0-9]{3})+)(?![0-9])")
_UNSIGNED = r"(?:[0-9]+(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
#: A minus counts as a sign where nothing stands before it from which something could be subtracted.
_SIGN = r"(?:(?<![0-9A-Za-z)\]])-\$?|(?<=\$)-)?"
_NUMBER = re.compile(
    rf"(?P<sign>{_SIGN})(?:"
    r"(?P<whole>[0-9]+)\s(?P<part>[0-9]+)/(?P<parts>[0-9]+)(?![0-9/])"  # 1 1/2
    r"|(?<![0-9./])(?P<over>[0-9]+)/(?P<under>[0-9]+)(?![0-9/])"  # 3/4
    rf"|(?P<factor>{_UNSIGNED})\s?(?:x|×|\*|\\times)\s?10\^\{{?(?P<power>-?[0-9]+)"  # 1.5 x 10^3
    rf"|(?P<plain>{_UNSIGNED}(?:[eE][-+]?[0-9]+(?![0-9A-Za-z]))?)"  # 12, .5, 1.5e3
    r")"
)

_IN_BRACKETS = re.compile(r"(?<![0-9A-Za-z])\(\s*([A-Ea-e])\s*\)")
_NAMED = re.compile(
    r"\b(?i:answer|option|choice)(?:\s+is)?\s*[:=]?\s*[*'\"\[{(]*"
    r"(?:([A-Eb-e])|(a)(?=[*'\"\])}]*(?:[.,;:!]|\s*$)))(?![\w'])"
)
_ALONE = re.compile(r"(?<![\w'])(?:([B-E])|(A)(?!\s+[a-z]))(?![\w'])")
_NOTHING_ELSE = re.compile(r"\s*([A-Ea-e])\s*[.):]?\s*")


def last_number(text: str) -> float | None:
    """Return the last number of a text.

    Args:
        text: what was generated.

    Returns:
        The number; None where there is none.
    """
    text = _THOUSANDS.sub(lambda match: match[1].replace(",", ""), text.replace("\N{MINUS SIGN}", "-"))
    values = [value for value in map(_value, _NUMBER.finditer(text)) if value is not None]
    return values[-1] if values else None


def _value(match: re.Match[str]) -> float | None:
    sign = -1.0 if match["sign"] else 1.0
    try:
        if match["whole"]:
            value = int(match["whole"]) + int(match["part"]) / int(match["parts"])
        elif match["over"]:
            value = int(match["over"]) / int(match["under"])
        elif match["factor"]:
            value = float(match["factor"]) * 10.0 ** int(match["power"])
        else:
            value = float(match["plain"])
    except (ZeroDivisionError, OverflowError):
        return None
    return sign * value if math.isfinite(value) else None


def is_number(text: str) -> bool:
    """Tell whether a text is one number and nothing else, so that an answer is compared by its value."""
    try:
        return math.isfinite(float(_THOUSANDS.sub(lambda match: match[1].replace(",", ""), text.strip())))
    except ValueError:
        return False


def same_number(text: str, answer: str) -> bool:
    """Tell whether the last number of a text is the answer, within `TOLERANCE`."""
    found, expected = last_number(text), last_number(answer)
    return found is not None and expected is not None and abs(found - expected) <= TOLERANCE


def letter(text: str) -> str | None:
    """Return the choice, A to E, that a text names.

    The last one in round brackets counts; without one the last that follows "answer", "option" or "choice"; without
    that the last capital that stands alone. "A" before a word in small letters is an article.

    Args:
        text: what was generated.

    Returns:
        The letter as a capital; None where no choice is named.
    """
    if only := _NOTHING_ELSE.fullmatch(text):
        return only[1].upper()
    for pattern in (_IN_BRACKETS, _NAMED, _ALONE):
        found = list(pattern.finditer(text))
        if found:
            return next(group for group in found[-1].groups() if group).upper()
    return None


def first_label(text: str, labels: Sequence[str]) -> str | None:
    """Return the first legal label of a text.

    Args:
        text: what was generated.
        labels: the legal ones, for example "answer1" and "answer2"; capitals and small letters are the same.

    Returns:
        The label as it is written in `labels`; None where none occurs as a word of its own.
    """
    choices = "|".join(map(re.escape, labels))
    found = re.search(rf"\b(?:{choices})\b", text, re.IGNORECASE)
    return None if found is None else next(label for label in labels if label.lower() == found[0].lower())
