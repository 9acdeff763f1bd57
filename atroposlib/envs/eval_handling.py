"""Evaluation beside training: when one is due, and how many groups may be in flight while it runs."""

from __future__ import annotations

from enum import Enum


class EvalHandlingEnum(Enum):
    """What training does during an evaluation. Groups that are in flight always finish."""

    STOP_TRAIN = "STOP_TRAIN"
    """No new group starts."""
    LIMIT_TRAIN = "LIMIT_TRAIN"
    """A share of the workers goes on: eval_limit_ratio."""
    NONE = "NONE"


def last_crossed(before: int, after: int, every: int) -> int | None:
    """The largest multiple of `every` in (before, after]; None when there is none, or `every` is 0 or less.

    Steps may jump over several multiples, or over one without touching it.
    """
    if every <= 0 or after // every <= before // every:
        return None
    return after // every * every


def training_limit(handling: EvalHandlingEnum, *, max_in_flight: int, ratio: float, is_evaluating: bool) -> int:
    """Groups that may be in flight now.

    Args:
        ratio: share of max_in_flight that goes on under LIMIT_TRAIN, rounded down.
    """
    if not is_evaluating or handling is EvalHandlingEnum.NONE:
        return max_in_flight
    return int(max_in_flight * ratio) if handling is EvalHandlingEnum.LIMIT_TRAIN else 0
