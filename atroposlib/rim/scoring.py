"""From the judges' scores to one reward: consistency rules, then the weighted mean. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from atroposlib.rim.config import ConsistencyRules


@dataclass(frozen=True)
class Change:
    """What a rule did to one judge's score."""

    judge: str
    before: float
    after: float
    why: str

    def __str__(self) -> str:
        return f"[lowered from {self.before:g} to {self.after:g}: {self.why}]"


def consistent(scores: Mapping[str, float], rules: ConsistencyRules) -> tuple[dict[str, float], list[Change]]:
    """The scores after the rules, and every change in order. A rule about a judge that has no score does nothing."""
    left = dict(scores)
    changes: list[Change] = []
    for rule in rules.order:
        found = _bound(rule, getattr(rules, rule), left)
        if found is not None and found[0] in left and left[found[0]] > found[1]:
            judge, bound, why = found
            changes.append(Change(judge, left[judge], bound, why))
            left[judge] = bound
    return {judge: min(max(score, 0.0), 1.0) for judge, score in left.items()}, changes


def weighted_mean(scores: Mapping[str, float], weights: Mapping[str, float]) -> float | None:
    """The mean over the judges that gave a score; weight 1 where none is given. None: no judge did."""
    if not scores:
        return None
    total = sum(weights.get(judge, 1.0) for judge in scores)
    return sum(weights.get(judge, 1.0) * score for judge, score in scores.items()) / total


def _bound(rule: str, value: float | None, scores: Mapping[str, float]) -> tuple[str, float, str] | None:
    """Judge, largest score it may have, and why. None: the rule is off or says nothing here."""
    if value is None:
        return None
    match rule:
        case "alignment_completeness_bound" if "accuracy" in scores:
            return "process", scores["accuracy"] + value, f"process may exceed accuracy by at most {value:g}"
        case "completeness_helpfulness_threshold" if scores.get("process", value) < value:
            return "helpfulness", value, f"process is below {value:g}"
        case "understanding_helpfulness_bound" if "diagnostic" in scores:
            return (
                "helpfulness",
                scores["diagnostic"] + value,
                f"helpfulness may exceed diagnostic by at most {value:g}",
            )
    return None
