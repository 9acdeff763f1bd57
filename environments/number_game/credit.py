"""Credit for each turn: what came after a turn, compared with what came after the same turn in the rest of the group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from statistics import fmean

from atroposlib.type_definitions import MASKED

# N: sequences of a group, K: turns of a sequence, T: tokens of a sequence


def turns(masks_T: Sequence[int]) -> list[slice]:
    """Where each turn's sampled tokens lie: the runs that are not masked."""
    runs: list[slice] = []
    start = 0
    for is_masked, run in groupby(masks_T, key=lambda mask: mask == MASKED):
        end = start + sum(1 for _ in run)
        if not is_masked:
            runs.append(slice(start, end))
        start = end
    return runs


def returns_to_go(rewards_K: Sequence[float]) -> list[float]:
    """[K] for each turn its reward and those of all later ones."""
    return list(accumulate(reversed(rewards_K)))[::-1]


def spread(values_K: Sequence[float], masks_T: Sequence[int]) -> list[float]:
    """[T] each turn's value on its tokens, 0.0 elsewhere.

    Raises:
        ValueError: there are more or fewer values than turns.
    """
    values_T = [0.0] * len(masks_T)
    for value, span in zip(values_K, turns(masks_T), strict=True):
        values_T[span] = [value] * (span.stop - span.start)
    return values_T


def centred(returns_NT: Sequence[Sequence[float]], masks_NT: Sequence[Sequence[int]]) -> list[list[float]]:
    """[N][T] less the mean of the group's returns at the same turn, over the sequences that have such a turn.

    A turn that only one sequence has is compared with nothing: its advantage is 0.
    """
    returns_NK = [[row[span.start] for span in turns(masks)] for row, masks in zip(returns_NT, masks_NT, strict=True)]
    means_K = list(_column_means(returns_NK))
    return [
        spread([value - mean for value, mean in zip(row, means_K, strict=False)], masks)
        for row, masks in zip(returns_NK, masks_NT, strict=True)
    ]


def _column_means(rows_NK: Sequence[Sequence[float]]) -> Iterator[float]:
    for turn in range(max(map(len, rows_NK), default=0)):
        yield fmean(row[turn] for row in rows_NK if turn < len(row))
