"""The student's final answer in its text, whether it is right, and whether a guidance gave it away."""

from __future__ import annotations

import re

from atroposlib.envs.reward_fns.answers import boxed, gold_answer
from atroposlib.envs.reward_fns.plain_math import number, same_answer

MAX_ANSWER = 200
"""Characters; whatever is longer is no answer."""

_TEACHING = re.compile(r"<teaching>(.*?)(?:</teaching>|\Z)", re.S | re.I)
_THINKING = re.compile(r"<thinking>.*?(?:</thinking>|\Z)", re.S | re.I)
_SOLUTION = re.compile(r"<solution>(.*?)(?:</solution>|\Z)", re.S | re.I)
_NUMBER_TEXT = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
_NUMBER = re.compile(_NUMBER_TEXT)
_LEADING_NUMBER = re.compile(rf"\W*?({_NUMBER_TEXT})")
_STATED = re.compile(r"\banswer\s*(?:is|:|=)+\s*(?P<said>[^\n]{1,200})", re.I)
_EQUALS = re.compile(rf"=\s*\$?({_NUMBER_TEXT})")
_THEREFORE = re.compile(r"\b(?:therefore|thus|hence)\b(?P<said>[^\n]*)", re.I)
_CLAUSE_END = re.compile(r"[.,;](?:\s|$)")


def teaching_of(text: str) -> str:
    """What the student gets to see of a teacher's text: the first <teaching> span, else all but the private thoughts."""
    found = _TEACHING.search(text)
    return (found[1] if found else _THINKING.sub("", text)).strip()


def extract_answer(text: str) -> str:
    r"""The final answer, normalised; "" where there is none.

    In this order: the last \boxed; then, within the last <solution> or else the whole text: "the answer is ...",
    "therefore ... N", "= N", the last number; then a <solution> that is a short text.
    """
    boxes = boxed(text)
    if boxes:
        return normalised(boxes[-1])
    solutions: list[str] = _SOLUTION.findall(text)
    place = solutions[-1] if solutions else text
    stated = _STATED.search(place)
    if stated:
        lead = _LEADING_NUMBER.match(stated["said"])
        return normalised(lead[1] if lead else stated["said"].split(". ")[0])
    for found in (_concluded(place), _EQUALS.findall(place), _NUMBER.findall(place)):
        if found:
            return normalised(found[-1])
    return normalised(place) if solutions and len(place) <= MAX_ANSWER else ""


def _concluded(text: str) -> list[str]:
    """Numbers of the first clause with any after the last "therefore"."""
    said = [found["said"] for found in _THEREFORE.finditer(text)]
    clauses = _CLAUSE_END.split(said[-1]) if said else []
    return next((numbers for clause in clauses if (numbers := _NUMBER.findall(clause))), [])


def normalised(answer: str) -> str:
    """Numbers without separators, whole ones without decimals and others with two; text in lower case, spaces squeezed."""
    bare = answer.strip().strip("$. \n")
    value = number(bare.replace(",", "")) if _NUMBER.fullmatch(bare) else None
    if value is None:
        return " ".join(bare.lower().split())
    return str(int(value)) if value == int(value) else f"{value:.2f}"


def correctness(answer: str, ground_truth: str) -> float:
    """1.0 for an answer that means what the ground truth does, else 0.0."""
    gold = gold_answer(ground_truth)
    return float(bool(answer) and (normalised(gold) == answer or same_answer(gold, answer)))


def gives_away(teaching: str, ground_truth: str, *, question: str, approach: str) -> bool:
    """Whether a guidance states the answer, which the student could read neither in the question nor in its own approach."""
    gold = normalised(gold_answer(ground_truth))
    return bool(gold) and _states(teaching, gold) and not _states(question, gold) and not _states(approach, gold)


def _states(text: str, answer: str) -> bool:
    if _NUMBER.fullmatch(answer):
        return answer in {normalised(found) for found in _numbers(text)}
    if len(answer) == 1:
        # A letter is everywhere; as an answer it stands in brackets or is announced.
        letter = re.escape(answer)
        return re.search(rf"\({letter}\)|\b(?:answer|option|choice)\W+(?:is\W+)?{letter}\b", text, re.I) is not None
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", " ".join(text.lower().split())) is not None


def _numbers(text: str) -> list[str]:
    """Every number, also without the sign before it: in `40-12` the minus is no sign."""
    found = _NUMBER.findall(text)
    return [*found, *(one.lstrip("+-") for one in found)]
