"""A judge's verdict, and how it is read from what a model wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from atroposlib.errors import RolloutError

MAX_OBJECTS_TRIED = 200
"""Opening braces that are tried in a text that is no JSON as a whole."""


class VerdictError(RolloutError):
    """A judge's text holds no usable verdict. The text says what was expected."""


@dataclass(frozen=True)
class Principle:
    """One criterion that the judge wrote for the case before it scored."""

    name: str
    weight: float
    """0 to 1 as the judge gave it; 0 where it gave none."""
    description: str = ""


@dataclass(frozen=True)
class Verdict:
    """One judge's answer for one trajectory at one temperature."""

    score: float
    """0 to 1."""
    uncertainty: float
    """0 to 1, the judge's own estimate."""
    rationale: str = ""
    principles: tuple[Principle, ...] = ()
    evidence: tuple[str, ...] = ()
    """What the judge points to, where it does."""
    is_clamped: bool = False
    """Whether score or uncertainty lay outside 0 to 1."""


def parse_verdict(text: str) -> Verdict:
    """The last JSON object with a score in a model's text; prose, code fences and thoughts around it do not matter.

    Raises:
        VerdictError: there is none, or score and uncertainty are not both numbers.
    """
    found = [one for one in _objects(text) if "score" in one]
    if not found:
        raise VerdictError(f'no JSON object with a "score" in {text[:120]!r}')
    return verdict_of(found[-1])


def verdict_of(data: Mapping[str, Any]) -> Verdict:
    """The verdict of a JSON object; fields that nobody reads are ignored.

    Raises:
        VerdictError: score or uncertainty is no number, or the object says that it is only a fallback.
    """
    if data.get("fallback"):
        raise VerdictError("the judge says that its answer is only a fallback")
    score, uncertainty = _number(data, "score"), _number(data, "uncertainty")
    inside = min(max(score, 0.0), 1.0), min(max(uncertainty, 0.0), 1.0)
    return Verdict(
        *inside,
        rationale=_text(data.get("rationale", data.get("explanation"))),
        principles=tuple(_principles(data.get("principles"))),
        evidence=tuple(_text(one) for one in _list(data.get("evidence"))),
        is_clamped=inside != (score, uncertainty),
    )


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The outermost JSON objects of a text, in order."""
    decoder = json.JSONDecoder()
    at = text.find("{")
    for _ in range(MAX_OBJECTS_TRIED):
        if at < 0:
            return
        try:
            value, end = decoder.raw_decode(text, at)
        # Thousands of nested brackets are no verdict either; nor is a number of thousands of digits.
        except (ValueError, RecursionError):
            end = at + 1
        else:
            yield value
        at = text.find("{", end)


def _number(data: Mapping[str, Any], name: str) -> float:
    value = data.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300 or math.isnan(value):
        raise VerdictError(f'"{name}" must be a number from 0 to 1, is {value!r:.40}')
    return float(value)


def _principles(value: Any) -> Iterator[Principle]:
    for one in _list(value):
        if isinstance(one, Mapping):
            weight: Any = one.get("weight")
            is_weight = isinstance(weight, int | float) and not isinstance(weight, bool) and 0 <= weight <= 1
            yield Principle(_text(one.get("name")), float(weight) if is_weight else 0.0, _text(one.get("description")))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any) -> str:
    # A judge can write half of a surrogate pair as an escape; no message could carry it on.
    return "" if value is None else str(value).encode("utf-8", "replace").decode()
