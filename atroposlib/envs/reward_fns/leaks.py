"""Whether a guidance gives the answer away."""

from __future__ import annotations

import re
from decimal import Decimal

from atroposlib.envs.reward_fns.answers import gold_answer
from atroposlib.envs.reward_fns.plain_math import number

_NUMBER_TEXT = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
_NUMBER = re.compile(_NUMBER_TEXT)
_SEPARATE_NUMBER = re.compile(rf"(?<![\w.]){_NUMBER_TEXT}")
"""Not the digits of a name such as H2O."""
_NUMBERING = re.compile(r"\b(?:step|part|hint|rule|point)\s*\d+\b|^\s*\d+[.):](?=\s)", re.I | re.M)
"""Numbers that count the guidance's own points."""


def gives_away(guidance: str, ground_truth: str, *, question: str, approach: str) -> bool:
    """Whether a guidance states the answer, which the student could read neither in the question nor in its own approach.

    Args:
        ground_truth: the answer, or a worked solution that ends in it.
    """
    gold = normalised(gold_answer(ground_truth))
    if not gold or states(question, gold) or states(approach, gold):
        return False
    return states(_NUMBERING.sub(" ", guidance), gold)


def states(text: str, answer: str) -> bool:
    """Whether a text holds a normalised answer as a number or words of its own."""
    if _NUMBER.fullmatch(answer):
        return answer in {normalised(found) for found in _numbers(text)}
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


def _numbers(text: str) -> list[str]:
    """Every number, also without the sign before it: in `40 -12` the minus may be no sign."""
    found = _SEPARATE_NUMBER.findall(text)
    return [*found, *(one.lstrip("+-") for one in found)]
