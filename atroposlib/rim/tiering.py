"""Whether the small model's verdicts can be used, or the large model must decide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import pstdev

from atroposlib.rim.verdict import Verdict

NO_VALID_SAMPLES = "tier1_no_valid_samples"


@dataclass(frozen=True)
class Pick:
    """This verdict stands, whole: its score and its reasons belong together."""

    verdict: Verdict


@dataclass(frozen=True)
class Escalate:
    """The large model decides."""

    reason: str


def decide(verdicts: Sequence[Verdict], *, variance_threshold: float, uncertainty_threshold: float) -> Pick | Escalate:
    """The least uncertain of the verdicts, unless they disagree or one of them is too uncertain.

    Args:
        verdicts: the valid ones, one for each temperature; of equally uncertain ones the first is picked.
        variance_threshold: largest population standard deviation of the scores.
        uncertainty_threshold: largest uncertainty of any.
    """
    if not verdicts:
        return Escalate(NO_VALID_SAMPLES)
    # Scores are decimals: the rounding of their binary form must not decide at the threshold.
    spread = round(pstdev(verdict.score for verdict in verdicts), 9)
    if spread > variance_threshold:
        return Escalate(f"tier1_scores_differ: standard deviation {spread:.4f} > {variance_threshold:g}")
    doubt = max(verdict.uncertainty for verdict in verdicts)
    if doubt > uncertainty_threshold:
        return Escalate(f"tier1_uncertain: {doubt:g} > {uncertainty_threshold:g}")
    return Pick(min(verdicts, key=lambda verdict: verdict.uncertainty))
