"""The student's final answer in its text, and whether it is right."""

from __future__ import annotations

import re

from atroposlib.envs.reward_fns.answers import boxed, gold_answer
from atroposlib.envs.reward_fns.leaks import normalised
from atroposlib.envs.reward_fns.plain_math import number, same_answer

MAX_ANSWER = 200
"""Characters; whatever is longer is no answer."""

_TEACHING = re.compile(r"<teaching>(.*?)(?:</teaching>|\Z)", re.S | re.I)
_THINKING = re.compile(r"<thinking>.*?(?:</thinking>|\Z)", re.S | re.I)
_SOLUTION = re.compile(r"<solution>(.*?)(?:</solution>|\Z)", re.S | re.I)
_NUMBER_TEXT = r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?<!\w)\.\d+)(?:[eE][-+]?\d+|/\d+)?"
"""Also 3/4, 1e5 and .5; the leak rule reads the parts of a fraction as numbers of their own."""
_NUMBER = re.compile(_NUMBER_TEXT)
_LEADING_NUMBER = re.compile(rf"\W*?({_NUMBER_TEXT})")
# What is said is looked ahead at, so that a second statement in the same line is found too.
_STATED = re.compile(r"\banswer\s*(?:is|:|=)+\s*+(?=(?P<said>[^\n]{1,200}))", re.I)
_EQUALS = re.compile(rf"=\s*\$?({_NUMBER_TEXT})")
_THEREFORE = re.compile(r"\b(?:therefore|thus|hence)\b(?P<said>[^\n]*)", re.I)
_CLAUSE_END = re.compile(r"[.,;](?:\s|$)")


def teaching_of(text: str) -> str:
    """What the student gets to see of a teacher's text: its first <teaching> span, else all of it; no private thoughts."""
    visible = _THINKING.sub("", text)
    # Thoughts that never end leave nothing, and there the teaching is looked for in all of it.
    found = _TEACHING.search(visible if "</thinking>" in text.lower() else text)
    return (found[1] if found else visible).strip()


def extract_answer(text: str) -> str:
    r"""The final answer, normalised; "" where there is none.

    In this order: the last \boxed; then, within the last <solution> or else the whole text: the last "the answer is ..."
    (one with a number before others), "therefore ... N", "= N", the last number; then a <solution> that is a short text.
    """
    boxes = boxed(text)
    if boxes:
        return _compared(boxes[-1])
    solutions: list[str] = _SOLUTION.findall(text)
    place = solutions[-1] if solutions else text
    for found in (_stated(place), _concluded(place), _EQUALS.findall(place), _NUMBER.findall(place)):
        if found:
            return _compared(found[-1])
    return _compared(place) if solutions and len(place) <= MAX_ANSWER else ""


def _stated(text: str) -> list[str]:
    """What "the answer is" announces: the numbers, or where none is announced, the texts."""
    said = [found["said"] for found in _STATED.finditer(text)]
    # "I am sure that my answer is right" announces nothing.
    numbers = [lead[1] for one in said if (lead := _LEADING_NUMBER.match(one))]
    return numbers or [one.split(". ")[0] for one in said]


def _concluded(text: str) -> list[str]:
    """Numbers of the first clause with any after the last "therefore"."""
    said = [found["said"] for found in _THEREFORE.finditer(text)]
    clauses = _CLAUSE_END.split(said[-1]) if said else []
    return next((numbers for clause in clauses if (numbers := _NUMBER.findall(clause))), [])


def _compared(answer: str) -> str:
    """Normalised; but numbers below 1 by four significant digits, as two decimals make 0.001 and 0.004 one."""
    bare = answer.strip()
    value = number(bare.replace(",", "")) if _NUMBER.fullmatch(bare) else None
    return normalised(answer) if value is None or abs(value) >= 1 else f"{value:.4g}"


def correctness(answer: str, ground_truth: str) -> float:
    """1.0 for an answer that means what the ground truth does, else 0.0."""
    gold = gold_answer(ground_truth)
    return float(bool(answer) and (_compared(gold) == answer or same_answer(gold, answer)))
