"""Problems for the student, out of the rows of a data set."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from atroposlib.data.answers import ground_truth_of, question_of
from atroposlib.teaching.episode import TeachingItem
from atroposlib.teaching.templates import DIAGNOSED, OPTIONAL

CONTEXT = tuple(dict.fromkeys(name for names in OPTIONAL.values() for name in names if name not in DIAGNOSED))
"""Columns that templates may use."""


def item_of(row: Mapping[str, Any]) -> TeachingItem:
    """The problem of a row.

    Raises:
        DataError: the row has no question.
    """
    context = {name: row[name] for name in CONTEXT if row.get(name) is not None}
    return TeachingItem(question_of(row), ground_truth_of(row), str(row.get("source_id", "")), context)


def shuffled_forever(items: Sequence[TeachingItem], seed: int) -> Iterator[TeachingItem]:
    """All items in an order that the seed decides, then all of them in another, without end."""
    rng = random.Random(seed)
    while items:
        yield from rng.sample(items, k=len(items))
