"""What judging cost and what came out, as metrics."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable

from atroposlib.rim.result import RIMResult

LATENCIES_KEPT = 1000


class Meter:
    """Sums since the last `take`.

    Args:
        logs_cost: the prices of the judge models are known.
    """

    def __init__(self, *, logs_cost: bool = False) -> None:
        self._logs_cost = logs_cost
        self.totals: Counter[str] = Counter()
        """calls, failed_calls, retries, repairs, cache_hits, prompt_tokens, completion_tokens, judgements, escalations,
        abstained, clamped, samples, samples_without_score, gamed, stops."""
        self.cost = 0.0
        """Of the calls, in the currency of the prices."""
        self.latencies_s: deque[float] = deque(maxlen=LATENCIES_KEPT)
        """Of the latest calls that were answered."""
        self._scores: dict[str, tuple[float, int]] = {}
        """Sum and number of the scores of each judge."""
        self._explanations: dict[str, str] = {}

    def add(self, results: Iterable[RIMResult]) -> None:
        """Count finished samples."""
        for result in results:
            self.totals["samples"] += 1
            self.totals["samples_without_score"] += result.score is None
            self.totals["gamed"] += bool(result.structured_reward.get("gaming"))
            for judge, score in result.judge_scores.items():
                total, n = self._scores.get(judge, (0.0, 0))
                self._scores[judge] = (total + score, n + 1)
                self._explanations[judge] = result.explanations.get(judge, "")

    def take(self) -> dict[str, float]:
        """The metrics since the last call; a share of nothing is left out."""
        totals, self.totals = self.totals, Counter()
        scores, self._scores = self._scores, {}
        metrics = {f"rim_rewards/{judge}": total / n for judge, (total, n) in scores.items()}
        names = (
            "calls",
            "failed_calls",
            "retries",
            "repairs",
            "cache_hits",
            "prompt_tokens",
            "completion_tokens",
            "clamped",
        )
        metrics |= {f"rim/{name}": float(totals[name]) for name in names}
        metrics |= _share("rim/escalation_rate", totals["escalations"], totals["judgements"])
        metrics |= _share("rim/failed_rate", totals["abstained"], totals["judgements"])
        metrics |= _share("rim/no_score_rate", totals["samples_without_score"], totals["samples"])
        metrics |= _share("rim/gamed_rate", totals["gamed"], totals["samples"])
        if self._logs_cost:
            metrics["rim/cost"], self.cost = self.cost, 0.0
        if self.latencies_s:
            metrics["rim/latency_p95"] = percentile(self.latencies_s, 0.95)
        return metrics

    def take_explanations(self) -> dict[str, str]:
        """The latest explanation of each judge, as `rim_explanations/<judge>`."""
        taken, self._explanations = self._explanations, {}
        return {f"rim_explanations/{judge}": text for judge, text in taken.items()}


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest of the values that `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _share(name: str, part: int, whole: int) -> dict[str, float]:
    return {name: part / whole} if whole else {}
