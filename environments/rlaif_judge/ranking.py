"""Who meets whom in a group, and what the results come to."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import TypeAlias

Pair: TypeAlias = tuple[int, int]
"""Two members of a group."""


def ring(n: int, opponents: int) -> list[Pair]:
    """Each member meets the next `opponents` of the circle, no two meet twice.

    Args:
        n: members.
        opponents: so that each member is in up to twice as many comparisons.
    """
    pairs = {tuple(sorted((i, (i + step) % n))) for i in range(n) for step in range(1, opponents + 1)}
    return sorted((low, high) for low, high in pairs if low != high)


def win_shares(n: int, results: Mapping[Pair, float | None]) -> list[float | None]:
    """Mean result of each member's comparisons; None for one that has none.

    Args:
        results: 1.0 where the pair's first won, 0.0 where its second did, 0.5; None where the judge failed.
    """
    wins: list[list[float]] = [[] for _ in range(n)]
    for (first, second), result in results.items():
        if result is not None:
            wins[first].append(result)
            wins[second].append(1.0 - result)
    return [fmean(won) if won else None for won in wins]
