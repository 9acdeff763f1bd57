"""Finds the final answer in a reply, and pairs completions with what they should say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

THINK_END = "</think>"
# Bounded, so that openings without an end cost little.
_MATH = re.compile(r"\$\$(.{1,500}?)\$\$|\$(.{1,500}?)\$|\\\((.{1,500}?)\\\)|\\\[(.{1,500}?)\\\]", re.DOTALL)
_HASHES = re.compile(r"####\s*(.+)")
_BRACES = re.compile(r"\\[{}]|(\\boxed\s*)?\{|\}")


def after_thinking(text: str) -> str:
    """What follows the last `</think>`; "" where thinking began and never ended; else the whole text."""
    if THINK_END in text:
        return text.rpartition(THINK_END)[2].strip()
    return "" if "<think>" in text else text.strip()


def boxed(text: str) -> list[str]:
    r"""Contents of every `\boxed{...}` in the order in which they begin; one that never closes is left out."""
    opened: list[tuple[int, bool]] = []
    found: list[tuple[int, str]] = []
    for brace in _BRACES.finditer(text):
        if brace[0] == "}":
            start, is_box = opened.pop() if opened else (0, False)
            if is_box:
                found.append((start, text[start : brace.start()]))
        elif not brace[0].startswith(("\\{", "\\}")):
            opened.append((brace.end(), brace[1] is not None))
    return [content for _, content in sorted(found)]


def final_answer(text: str) -> str | None:
    r"""The last \boxed, else what follows the last ####, else the last formula; None without any."""
    formulas = [next(filter(None, groups)) for groups in _MATH.findall(text)]
    found = boxed(text) or _HASHES.findall(text) or formulas
    return str(found[-1]).strip() if found else None


def gold_answer(gold: Any) -> str:
    r"""The bare answer of a data set's solution: what follows #### (GSM8K), else the last \boxed (MATH), else all of it."""
    text = str(gold)
    found = _HASHES.findall(text) or boxed(text) or [text]
    return str(found[-1]).strip().strip("$").strip()


def golds(solution: Any, ground_truth: Any, n_completions: int) -> list[Any]:
    """The answer that each completion should give.

    Args:
        ground_truth: preferred to solution. Either is one answer for all, or a list with one for each.
    Raises:
        ValueError: both are missing, or a list has another length.
    """
    gold = solution if ground_truth is None else ground_truth
    if gold is None:
        raise ValueError("pass solution= or ground_truth=")
    if not isinstance(gold, Sequence) or isinstance(gold, str):
        return [gold] * n_completions
    if len(gold) != n_completions:
        raise ValueError(f"{len(gold)} answers for {n_completions} completions; pass one for all, or one for each")
    return list(gold)
