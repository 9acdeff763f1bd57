"""Whether a guidance gives the answer away."""

from __future__ import annotations

import re
from decimal import Decimal

from atroposlib.envs.reward_fns.answers import gold_answer
from atroposlib.envs.reward_fns.plain_math import MAX_CHARACTERS, number

_NUMBER_TEXT = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
_NUMBER = re.compile(_NUMBER_TEXT)
_SEPARATE_NUMBER = re.compile(rf"(?<![\w.])(?:{_NUMBER_TEXT}(?:[eE][-+]?\d+)?|[-+]?\.\d+)")
"""Also 1e5 and .5; not the digits of a name such as H2O."""
_FRACTION = re.compile(r"[-+]?(?:\\[dt]?frac\s*(?:\{\d+\}\s*\{\d+\}|\d\s*\d)|(?<![\w./])\d+\s*/\s*\d+(?![\w/]))")
_NUMBERING = re.compile(r"\b(?:step|part|hint|rule|point)\s*[1-9]\b|^\s*[1-9][.):](?=\s)", re.I | re.M)
"""Numbers that count the guidance's own points: of one digit, as "hint 42" would be a way to say 42."""


def gives_away(guidance: str, ground_truth: str, *, question: str, approach: str) -> bool:
    """Whether a guidance states the answer, which the student could read neither in the question nor in its own approach.

    Args:
        ground_truth: the answer, or a worked solution that ends in it.
    """
    gold = gold_answer(ground_truth)
    if states(question, gold) or states(approach, gold):
        return False
    return states(_NUMBERING.sub(" ", guidance), gold)


def states(text: str, answer: str) -> bool:
    """Whether a text holds an answer, as it is written or by its value, as a number or words of its own."""
    return any(_holds(text, form, answer) for form in {normalised(answer), by_value(answer)} - {""})


def _holds(text: str, form: str, answer: str) -> bool:
    if _NUMBER.fullmatch(form):
        # Where the answer is 3, 12/4 is the calculation; where it is 3/4, 6/8 is the answer.
        fractions = _FRACTION.findall(text) if _FRACTION.search(answer) else []
        return form in {by_value(found) for found in _with_bare([*_SEPARATE_NUMBER.findall(text), *fractions])}
    return _holds_words(text, form)


def _holds_words(text: str, answer: str) -> bool:
    if len(answer) == 1:
        # A letter is everywhere; as an answer it stands in brackets or is announced.
        letter = re.escape(answer)
        return re.search(rf"\({letter}\)|\b(?:answer|option|choice)\W+(?:is\W+)?{letter}\b", text, re.I) is not None
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", " ".join(text.lower().split())) is not None


def normalised(answer: str) -> str:
    """Numbers without separators, whole ones without decimals; text in lower case, spaces squeezed.

    Other numbers have two decimals; below 1, four significant digits.
    """
    bare = answer.strip().rstrip("$. \n").lstrip("$ \n")
    value = number(bare.replace(",", "")) if _NUMBER.fullmatch(bare) else None
    if value is None:
        return " ".join(bare.lower().split())
    if value == int(value):
        return str(int(value))
    return f"{value:.2f}" if abs(value) >= 1 else format(Decimal(f"{value:.4g}"), "f")


def by_value(answer: str) -> str:
    r"""As normalised, but of 3/4, \frac{3}{4}, 50\% or 1e5 the value. Not of 3-2, which may be a score or a range."""
    has_value = len(answer) <= MAX_CHARACTERS and re.search(r"\d", answer) and not re.search(r"\d\s*[-+]\s*\d", answer)
    value = number(answer) if has_value else None
    return normalised(answer) if value is None else normalised(format(Decimal(repr(value)), "f"))


def _with_bare(numbers: list[str]) -> list[str]:
    """Each also without the sign before it: in `40 -12` the minus may be no sign."""
    return [*numbers, *(one.lstrip("+-") for one in numbers)]
