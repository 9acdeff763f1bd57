"""What can be asked of a reply, each as a small pure function of its text: does the reply do as told?"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from atroposlib.errors import ConfigError

Constraint = Mapping[str, Any]
"""`kind`, the name of a checker, and its arguments."""

WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)")
BULLET = re.compile(r"^\s*[-*•]\s+\S", re.MULTILINE)
NUMBERED = re.compile(r"^\s*(\d+)[.)]\s+\S", re.MULTILINE)
HEADING = re.compile(r"^#{1,6} \S", re.MULTILINE)
PLACEHOLDER = re.compile(r"\[[^\[\]\n]+\]")
FENCE = re.compile(r"\A```(?:json)?\s*\n(.*)\n```\Z", re.DOTALL)


def words(text: str, *, at_least: int = 0, at_most: int | None = None) -> bool:
    """Number of words."""
    return _within(len(WORD.findall(text)), at_least, at_most)


def sentences(text: str, *, at_least: int = 0, at_most: int | None = None) -> bool:
    """Number of sentences: runs of . ! ? before a blank or the end."""
    return _within(len(SENTENCE_END.findall(text)), at_least, at_most)


def paragraphs(text: str, *, exactly: int) -> bool:
    """Number of paragraphs, with an empty line between them."""
    return len([part for part in re.split(r"\n\s*\n", text) if part.strip()]) == exactly


def bullets(text: str, *, exactly: int) -> bool:
    """Number of lines that begin with -, * or •."""
    return len(BULLET.findall(text)) == exactly


def numbered(text: str, *, exactly: int) -> bool:
    """A list numbered 1, 2, ... up to that number."""
    return [int(number) for number in NUMBERED.findall(text)] == list(range(1, exactly + 1))


def headings(text: str, *, at_least: int) -> bool:
    """Number of Markdown headings."""
    return len(HEADING.findall(text)) >= at_least


def contains(text: str, *, words: Sequence[str], times: int = 1) -> bool:
    """Every word or phrase occurs so many times, in whatever case."""
    return all(_occurrences(text, word) >= times for word in words)


def avoids(text: str, *, words: Sequence[str]) -> bool:
    """None of the words or phrases occurs."""
    return not any(_occurrences(text, word) for word in words)


def starts_with(text: str, *, phrase: str) -> bool:
    """The first words, in this case."""
    return text.lstrip().startswith(phrase)


def ends_with(text: str, *, phrase: str) -> bool:
    """The last words, in this case."""
    return text.rstrip().endswith(phrase)


def lowercase(text: str) -> bool:
    """Letters, and none of them a capital."""
    return text.islower()


def uppercase(text: str) -> bool:
    """Letters, and all of them capitals."""
    return text.isupper()


def capital_words(text: str, *, at_least: int = 0, at_most: int | None = None) -> bool:
    """Number of words of two and more letters all in capitals."""
    return _within(sum(len(word) > 1 and word.isupper() for word in WORD.findall(text)), at_least, at_most)


def without_commas(text: str) -> bool:
    """No comma anywhere, and something said."""
    return "," not in text and bool(text.strip())


def letter(text: str, *, letter: str, at_least: int = 0, at_most: int | None = None) -> bool:
    """How often a letter occurs, in whatever case."""
    return _within(text.lower().count(letter.lower()), at_least, at_most)


def placeholders(text: str, *, at_least: int) -> bool:
    """Number of [placeholders] in square brackets."""
    return len(PLACEHOLDER.findall(text)) >= at_least


def json_object(text: str, *, keys: Sequence[str]) -> bool:
    """One JSON object with exactly these keys and nothing around it but, maybe, a code fence."""
    fenced = FENCE.match(text.strip())
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and set(value) == set(keys)


def quoted(text: str) -> bool:
    """The whole reply in double quotation marks."""
    said = text.strip()
    return len(said) > 2 and said.startswith('"') and said.endswith('"')


CHECKERS: dict[str, Callable[..., bool]] = {
    checker.__name__: checker
    for checker in (
        *(words, sentences, paragraphs, bullets, numbered, headings, contains, avoids, starts_with, ends_with),
        *(lowercase, uppercase, capital_words, without_commas, letter, placeholders, json_object, quoted),
    )
}


def is_met(constraint: Constraint, text: str) -> bool:
    """Whether a reply meets a constraint; an empty one meets none."""
    return bool(text.strip()) and CHECKERS[constraint["kind"]](text, **_arguments(constraint))


def problem_of(constraint: Any) -> str | None:
    """What is wrong with a constraint as data; None when nothing is."""
    kind = constraint.get("kind") if isinstance(constraint, Mapping) else None
    if kind not in CHECKERS:
        return f"unknown constraint {constraint!r}; kinds: {', '.join(CHECKERS)}"
    try:
        inspect.signature(CHECKERS[kind]).bind("", **_arguments(constraint))
    except TypeError as error:
        return f"constraint {kind!r}: {error}"
    return None


def validated(constraints: Sequence[Any]) -> tuple[Constraint, ...]:
    """The constraints.

    Raises:
        ConfigError: there are none, or one is unknown or lacks an argument.
    """
    problems = [problem for constraint in constraints if (problem := problem_of(constraint)) is not None]
    if problems or not constraints:
        raise ConfigError(problems[0] if problems else "an instruction needs at least one constraint")
    return tuple(constraints)


def _arguments(constraint: Constraint) -> dict[str, Any]:
    # Data sets of the hub fill fields that a row lacks with None.
    return {name: value for name, value in constraint.items() if name != "kind" and value is not None}


def _within(count: int, at_least: int, at_most: int | None) -> bool:
    return at_least <= count and (at_most is None or count <= at_most)


def _occurrences(text: str, phrase: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE))
