"""What held-out items say about a teacher: means, and 95 % intervals by a paired bootstrap over the items."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
SEED = 0
KILO = 1000
"""Tokens of teaching that the efficiency score is measured by."""

Columns = dict[str, npt.NDArray[np.float64]]


@dataclass(frozen=True)
class Outcome:
    """One item, with and without teaching."""

    baseline: float
    """Score without, 0 to 1."""
    taught: float
    """Score with."""
    teaching_tokens: float
    is_complete: bool
    """Whether the taught solution ended by itself, not at the token limit."""
    is_leak: bool
    """Whether the guidance states the answer."""


def summary(outcomes: Sequence[Outcome], *, seed: int = SEED) -> dict[str, float]:
    """Figures of an evaluation; of each also NAME_low and NAME_high, its 95 % interval.

    An item is drawn with all that belongs to it, so that the difference between taught and unaided is that of pairs.

    Raises:
        ValueError: there is no outcome.
    Source: Efron and Tibshirani 1993, "An introduction to the bootstrap", percentile intervals.
    """
    if not outcomes:
        raise ValueError("an evaluation needs at least one held-out item")
    columns = _columns(outcomes)
    n = len(outcomes)
    draws = np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))
    metrics: dict[str, float] = {"heldout_size": n}
    for name, statistic in STATISTICS.items():
        drawn = statistic({key: column[draws] for key, column in columns.items()})
        low, high = np.quantile(drawn, (0.025, 0.975))
        metrics[name] = float(statistic({key: column[None] for key, column in columns.items()})[0])
        metrics |= {f"{name}_low": float(low), f"{name}_high": float(high)}
    return metrics


def _columns(outcomes: Sequence[Outcome]) -> Columns:
    return {
        "baseline": np.array([one.baseline for one in outcomes], dtype=float),
        "taught": np.array([one.taught for one in outcomes], dtype=float),
        "tokens": np.array([one.teaching_tokens for one in outcomes], dtype=float),
        "complete": np.array([one.is_complete for one in outcomes], dtype=float),
        "leak": np.array([one.is_leak for one in outcomes], dtype=float),
    }


def counted(delta: npt.ArrayLike, is_leak: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Changes of the score, where an answer that was given away counts as no gain."""
    return np.where(is_leak, np.minimum(delta, 0.0), delta)


def _heldout_reward(columns: Columns) -> npt.NDArray[np.float64]:
    reward: npt.NDArray[np.float64] = counted(columns["taught"] - columns["baseline"], columns["leak"] > 0).mean(axis=1)
    return reward


def _efficiency(columns: Columns) -> npt.NDArray[np.float64]:
    """Teaching efficiency score: accuracy gain * completion rate / (mean tokens of teaching / 1000); a token at least."""
    gain = (columns["taught"] - columns["baseline"]).mean(axis=1)
    tokens = np.maximum(columns["tokens"].mean(axis=1), 1.0)
    score: npt.NDArray[np.float64] = gain * columns["complete"].mean(axis=1) / (tokens / KILO)
    return score


def _non_degradation(columns: Columns) -> npt.NDArray[np.float64]:
    lost = (columns["baseline"] >= 0.5) & (columns["taught"] < 0.5)
    share: npt.NDArray[np.float64] = 1.0 - lost.mean(axis=1)
    return share


STATISTICS: dict[str, Callable[[Columns], npt.NDArray[np.float64]]] = {
    "heldout_reward": _heldout_reward,
    "student_accuracy": lambda columns: columns["taught"].mean(axis=1),
    "baseline_accuracy": lambda columns: columns["baseline"].mean(axis=1),
    "accuracy_delta": lambda columns: (columns["taught"] - columns["baseline"]).mean(axis=1),
    "non_degradation_rate": _non_degradation,
    "leak_rate": lambda columns: columns["leak"].mean(axis=1),
    "completion_rate": lambda columns: columns["complete"].mean(axis=1),
    "teaching_tokens": lambda columns: columns["tokens"].mean(axis=1),
    "teaching_efficiency_score": _efficiency,
}
"""Each over the rows [R, items] of resampled columns."""
