"""Problems of reasoning-gym: made from a seed, scored by the task's own rule."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS

from atroposlib.errors import ConfigError

log = logging.getLogger(__name__)

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@dataclass(frozen=True)
class Problem:
    """A question of one task."""

    task: str
    question: str
    entry: Mapping[str, Any] = field(compare=False, repr=False)
    """As reasoning-gym made it: what its scoring wants to see."""


class TaskMix:
    """Problems of several tasks by turns, each from a stream that its seed decides.

    Args:
        options: parameters of a task's generator, by the task's name.
        size: problems of each task; they begin again after that.
    Raises:
        ConfigError: there is no such task, or its generator refuses the options.
    """

    def __init__(self, tasks: Sequence[str], options: Mapping[str, Mapping[str, Any]], *, seed: int, size: int) -> None:
        for name in options:
            if name not in tasks:
                raise ConfigError(f"task_options are given for {name!r}, which is not among tasks={list(tasks)}")
        self.size = size
        self._tasks = [(name, create(name, options.get(name, {}), seed=seed, size=size)) for name in tasks]

    def problem(self, index: int) -> Problem:
        """The index-th problem."""
        turn, place = index % len(self._tasks), index // len(self._tasks) % self.size
        name, dataset = self._tasks[turn]
        entry = dataset[place]
        return Problem(name, entry["question"], entry)

    def score(self, problem: Problem, text: str) -> float:
        """What the task pays for the answer in a reply, 0 to 1; 0 without an answer."""
        answer = extract_answer(text)
        if answer is None:
            return 0.0
        dataset = dict(self._tasks)[problem.task]
        try:
            return min(1.0, max(0.0, float(dataset.score_answer(answer, entry=problem.entry))))
        # Some tasks' rules parse the answer and raise whatever their parser raises on what the policy wrote.
        except Exception as error:
            log.debug("%s cannot read the answer %r: %r", problem.task, answer[:80], error)
            return 0.0


def create(name: str, options: Mapping[str, Any], *, seed: int, size: int) -> Any:
    """The data set of a task.

    Raises:
        ConfigError: there is no such task, or it refuses the options.
    """
    if name not in DATASETS:
        near = ", ".join(get_close_matches(name, DATASETS, n=3)) or "see reasoning_gym.factory.DATASETS"
        raise ConfigError(f"reasoning-gym has no task {name!r}; close: {near}")
    try:
        return reasoning_gym.create_dataset(name, seed=seed, size=size, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"task {name!r} refuses task_options={dict(options)}, size={size}: {error}") from error


def extract_answer(text: str) -> str | None:
    """What stands between the last <answer> and </answer>; None without."""
    found = ANSWER.findall(text)
    return str(found[-1]).strip() if found else None
