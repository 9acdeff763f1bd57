"""Figures of the protocol since the last log."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev

from atroposlib.teaching.episode import PaidLesson, Preparation
from atroposlib.teaching.rewards import RIGHT_FROM

TOKEN_UNIT = 100
"""Tokens of teaching that token_efficiency is measured by."""


class TeachingMetrics:
    """Collects figures; `take` hands them over and starts anew."""

    def __init__(self) -> None:
        self._samples: dict[str, list[float]] = defaultdict(list)
        self._dropped: Counter[str] = Counter()

    def note_group(self, preparation: Preparation, paid: Sequence[PaidLesson]) -> None:
        """A group that was scored."""
        self._samples["student_approach_length"].append(preparation.diagnosis.probe_tokens)
        self._samples["capability_level"].append(preparation.diagnosis.capability_level)
        for one in paid:
            self._note_lesson(preparation, one)

    def note_drop(self, reason: str) -> None:
        """An item that gives no group."""
        self._dropped[reason] += 1

    def _note_lesson(self, preparation: Preparation, paid: PaidLesson) -> None:
        lesson, samples = paid.lesson, self._samples
        samples["reward"].append(paid.reward)
        samples["teaching_length"].append(lesson.guidance.tokens)
        samples["empty_teaching_rate"].append(not lesson.guidance.teaching)
        samples["leak_rate"].append(lesson.is_leak)
        if preparation.item.ground_truth is not None:
            self._note_scores(preparation.baseline_score, lesson.score)
        if "reference_reward" in paid.details:
            samples["reference_reward"].append(paid.details["reference_reward"])

    def _note_scores(self, baseline: float, taught: float) -> None:
        was_right, is_right = baseline >= RIGHT_FROM, taught >= RIGHT_FROM
        samples = self._samples
        samples["student_accuracy"].append(taught)
        samples["baseline_accuracy"].append(baseline)
        samples["accuracy_delta"].append(taught - baseline)
        samples["improvement_rate"].append(is_right and not was_right)
        samples["degradation_rate"].append(was_right and not is_right)
        samples["non_degrade_rate"].append(not (was_right and not is_right))

    def take(self) -> dict[str, float]:
        """Means, and counts of dropped items by reason, by name under `teaching/`."""
        samples, self._samples = self._samples, defaultdict(list)
        dropped, self._dropped = self._dropped, Counter()
        metrics = {f"teaching/{name}": fmean(values) for name, values in samples.items()}
        metrics |= {f"teaching/dropped_{reason}": float(count) for reason, count in dropped.items()}
        if lengths := samples.get("teaching_length"):
            metrics |= _length_figures(lengths, samples["reward"])
            del metrics["teaching/teaching_length"]
        return metrics


def approach_figures(judged: Mapping[str, float]) -> dict[str, float]:
    """The figures of the judge of approaches under names of their own; nothing where there was no call for it."""
    # One that is stopped gets no calls, and that is what is to be seen.
    if not judged["rim/calls"] + judged["rim/cache_hits"] + judged["rim/stopped"]:
        return {}
    return {f"teaching/approach_{name.rpartition('/')[2]}": value for name, value in judged.items()}


def _length_figures(lengths: Sequence[float], rewards: Sequence[float]) -> dict[str, float]:
    """Mean and spread in tokens, and the reward that each TOKEN_UNIT of tokens earns."""
    mean = fmean(lengths)
    return {
        "teaching/teaching_length_mean": mean,
        "teaching/teaching_length_std": pstdev(lengths),
        "teaching/token_efficiency": fmean(rewards) / (max(mean, 1.0) / TOKEN_UNIT),
    }
