"""Durations and attempts of the latest requests to one server, and the metrics made of them."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence


class RequestStats:
    """Keeps the latest requests.

    Args:
        length: requests kept; 0 or less keeps one.
    """

    def __init__(self, length: int) -> None:
        self.timings: deque[float] = deque(maxlen=max(length, 1))
        """Seconds a request took, waiting for a slot included."""
        self.attempts: deque[int] = deque(maxlen=max(length, 1))
        """Attempts a request took: 1 where the first one succeeded."""

    def record(self, seconds: float, attempts: int) -> None:
        """Note a request that succeeded."""
        self.timings.append(seconds)
        self.attempts.append(attempts)


def timing_metrics(timings: Sequence[float], name: str) -> dict[str, float]:
    """Mean, population standard deviation and 99th percentile, in seconds; nothing where nothing was timed."""
    if not timings:
        return {}
    return {
        f"{name}_avg": statistics.fmean(timings),
        f"{name}_std": statistics.pstdev(timings),
        f"{name}_99p": percentile(timings, 0.99),
    }


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie, linear between neighbours.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("a percentile needs at least one value")
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def request_metrics(server_name: str, train: RequestStats, evaluation: RequestStats) -> dict[str, float]:
    """The metrics of one server under upstream's names; the retry rate is retries for each evaluation request."""
    metrics = timing_metrics(train.timings, "request_time") | timing_metrics(evaluation.timings, "eval_request_time")
    if train.attempts:
        metrics["average_num_attempts"] = statistics.fmean(train.attempts)
    if evaluation.attempts:
        metrics["eval_retry_rate"] = statistics.fmean(evaluation.attempts) - 1
    return {f"server/{server_name}_{name}": value for name, value in metrics.items()}
