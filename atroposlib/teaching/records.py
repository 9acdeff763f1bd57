"""What is kept of teaching on disk: some groups in full, and every guidance that clearly worked."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from atroposlib.teaching.episode import PaidLesson, Preparation
from atroposlib.utils.plain_json import plain

log = logging.getLogger(__name__)

EPISODES = "episodes.jsonl"
SUCCESSES = "successful_teaching"
SUCCESS_FROM = 1.0
MAX_BYTES = 32 * 2**20
"""Of episodes.jsonl before it is set aside; the part before it is kept."""
MAX_SUCCESSES = 2000
"""Files that one process writes."""


class TeachingRecords:
    """Writes into a run's folder. What cannot be written is warned of and left out: the group is worth more.

    Args:
        folder: None writes nothing.
        probability: of each group to be written in full.
    """

    def __init__(self, folder: Path | None, *, probability: float, seed: int) -> None:
        self._folder = folder
        self._probability = probability
        self._chance = random.Random(f"episodes {seed}")
        self._successes = 0

    def note_group(self, step: int, preparation: Preparation, paid: Sequence[PaidLesson]) -> None:
        """A group that was scored."""
        is_chosen = self._chance.random() < self._probability
        if self._folder is None:
            return
        try:
            if is_chosen:
                self._append(self._folder, {**_facts(step, preparation), "lessons": [_lesson(one) for one in paid]})
            for one in paid:
                if one.reward >= SUCCESS_FROM and self._successes < MAX_SUCCESSES:
                    self._keep_success(self._folder, step, {**_facts(step, preparation), **_lesson(one)})
        except OSError as error:
            log.warning("a group is not recorded in full in %s: %s", self._folder, error)

    def _append(self, folder: Path, row: dict[str, Any]) -> None:
        path = folder / EPISODES
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size >= MAX_BYTES:
            path.replace(path.with_suffix(".1.jsonl"))
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, default=plain) + "\n")

    def _keep_success(self, folder: Path, step: int, row: dict[str, Any]) -> None:
        place = folder / SUCCESSES
        place.mkdir(parents=True, exist_ok=True)
        text = json.dumps(row, indent=2, default=plain)
        while True:
            self._successes += 1
            try:
                # Exclusive: files of an earlier start of the same run stay.
                with (place / f"step{step:06d}-{self._successes:05d}.json").open("x", encoding="utf-8") as file:
                    file.write(text + "\n")
            except FileExistsError:
                continue
            return


def _facts(step: int, preparation: Preparation) -> dict[str, Any]:
    item = preparation.item
    return {
        "step": step,
        "question": item.question,
        "ground_truth": item.ground_truth,
        "source_id": item.source_id,
        "context": dict(item.context),
        "prompt": preparation.teacher_prompt,
        "approach": preparation.diagnosis.approach,
        "diagnosis": diagnosis_facts(preparation),
        "baseline_score": preparation.baseline_score,
        "baseline_solutions": [asdict(attempt) for attempt in preparation.baseline],
    }


def _lesson(paid: PaidLesson) -> dict[str, Any]:
    lesson = paid.lesson
    return {
        **lesson_facts(paid),
        "full_response": lesson.guidance.text,
        "solutions": [asdict(attempt) for attempt in lesson.attempts],
    }


def diagnosis_facts(preparation: Preparation) -> dict[str, Any]:
    """The diagnosis without the student's text."""
    diagnosis = preparation.diagnosis
    return {
        "capability_level": diagnosis.capability_level,
        "confidence_score": diagnosis.confidence_score,
        "tier": diagnosis.tier,
        "identified_gaps": list(diagnosis.identified_gaps),
        "response_quality": dict(diagnosis.response_quality),
        "probe_tokens": diagnosis.probe_tokens,
    }


def lesson_facts(paid: PaidLesson) -> dict[str, Any]:
    """What a lesson was worth, and why."""
    lesson = paid.lesson
    return {
        "teaching": lesson.guidance.teaching,
        "teaching_tokens": lesson.guidance.tokens,
        "score": lesson.score,
        "answers": [attempt.answer for attempt in lesson.attempts],
        "is_leak": lesson.is_leak,
        "reward": paid.reward,
        **paid.details,
    }
