"""Order and split of rows, decided by seeds and hashes alone, so that every process makes the same of the same rows."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def fraction(value: Any) -> float:
    """Where a value falls between 0 and 1, the same on every machine."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def shuffled(rows: Sequence[T], seed: int) -> list[T]:
    """The rows in an order that the seed decides."""
    return random.Random(seed).sample(rows, k=len(rows))


def split_by_order(rows: Sequence[T], share: float, source: Callable[[T], Hashable]) -> tuple[list[T], list[T]]:
    """Training rows, and those of the last sources.

    Args:
        share: of the sources, 0 to 1, that are held out: rounded down, but one at least.
        source: what tells the sources of rows apart.
    """
    sources = list(dict.fromkeys(map(source, rows)))
    n_held_out = max(1, math.floor(len(sources) * share)) if share > 0 and sources else 0
    held_out = set(sources[len(sources) - n_held_out :])
    return _parted(rows, lambda row: source(row) in held_out)


def split_by_hash(rows: Sequence[T], share: float, source: Callable[[T], Any]) -> tuple[list[T], list[T]]:
    """Training rows, and those whose source's hash falls below the share, about that share of the sources.

    A row stays on its side when others are added, and rows of one source are never on both.
    """
    return _parted(rows, lambda row: fraction(source(row)) < share)


def _parted(rows: Sequence[T], is_held_out: Callable[[T], bool]) -> tuple[list[T], list[T]]:
    train: list[T] = []
    held_out: list[T] = []
    for row in rows:
        (held_out if is_held_out(row) else train).append(row)
    return train, held_out
