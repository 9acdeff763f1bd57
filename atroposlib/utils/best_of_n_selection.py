"""Chooses one of several candidates by two scores."""

from __future__ import annotations

from collections.abc import Sequence


def select_best_index(
    primary_scores: Sequence[float],
    secondary_scores: Sequence[float],
    primary_higher_is_better: bool = True,
    secondary_lower_is_better: bool = True,
) -> int:
    """Index of the best primary score; the secondary score breaks ties, then the earlier candidate wins.

    Raises:
        ValueError: there are no scores, or not one of each for every candidate.
    """
    if not primary_scores:
        raise ValueError("select_best_index needs at least one candidate, got empty primary_scores")
    if len(primary_scores) != len(secondary_scores):
        raise ValueError(
            f"select_best_index needs both scores of every candidate, got {len(primary_scores)} primary_scores and "
            f"{len(secondary_scores)} secondary_scores"
        )
    primary_sign = -1 if primary_higher_is_better else 1
    secondary_sign = 1 if secondary_lower_is_better else -1
    return min(
        range(len(primary_scores)),
        key=lambda i: (primary_sign * primary_scores[i], secondary_sign * secondary_scores[i]),
    )
