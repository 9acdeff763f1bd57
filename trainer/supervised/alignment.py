"""Which tokens of two tokenizations of one text say the same: the shortest spans of characters that both have. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """Tokens start to stop of each side, at least one of each."""

    student: tuple[int, int]
    teacher: tuple[int, int]


def common_spans(student_ends: Sequence[int], teacher_ends: Sequence[int]) -> list[Span]:
    """Cut two tokenizations of one text wherever both end a token after the same character.

    Tokens without a character of their own (pieces of one, or markers) stay in the span of what comes before them, at the
    start of what comes after. Tokens after the last common end are in no span.

    Args:
        student_ends: for each token, how many characters of the text end with it; never falling.
        teacher_ends: the same of the other tokenization.
    Returns:
        Spans in order, without gaps from the first token on.
    Raises:
        ValueError: ends that fall.
    """
    student, teacher = _stops(student_ends), _stops(teacher_ends)
    spans: list[Span] = []
    before = (0, 0)
    for end in sorted(student.keys() & teacher.keys()):
        stops = (student[end], teacher[end])
        spans.append(Span((before[0], stops[0]), (before[1], stops[1])))
        before = stops
    return spans


def span_of_each(spans: Sequence[Span], tokens: int) -> list[int]:
    """For each of the student's tokens the place of its span; -1 for those in none."""
    places = [-1] * tokens
    for place, span in enumerate(spans):
        start, stop = span.student
        places[start:stop] = [place] * (stop - start)
    return places


def character_ends(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> tuple[str, list[int]]:
    """The text of sampled ids, and how many of its characters end with each of them.

    Found by decoding longer and longer beginnings: sampled ids need not be those that the tokenizer would make of the text.

    Args:
        decode: ids to text, special tokens included.
    """
    text = decode(ids)
    ends: list[int] = []
    last = 0
    for stop in range(1, len(ids) + 1):
        beginning = text if stop == len(ids) else decode(ids[:stop])
        # A character of several tokens agrees with the text with the last of them: before, its bytes are no character.
        last = max(last, _common_length(beginning, text))
        ends.append(last)
    return text, ends


def _stops(ends: Sequence[int]) -> dict[int, int]:
    """The number of tokens up to each end, without the end 0."""
    stops: dict[int, int] = {}
    last = 0
    for index, end in enumerate(ends):
        if end < last:
            raise ValueError(f"ends of tokens must not fall: {end} after {last}")
        last = end
        if end > 0:
            stops[end] = index + 1
    return stops


def _common_length(one: str, other: str) -> int:
    if other.startswith(one):
        return len(one)
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
