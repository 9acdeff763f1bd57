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
EVALUATED_BY: Mapping[str, str] = {
    "binary_matrix": "eval",
    "composite": "the rules of the tasks it is made of",
    "countdown": "sympy.parse_expr",
    "intermediate_integration": "sympy.parse_expr",
    "n_queens": "eval",
    "polynomial_multiplication": "sympy.parse_expr",
    "puzzle24": "sympy.parse_expr",
    "simple_integration": "sympy.parse_expr",
    "spiral_matrix": "eval",
    "string_insertion": "eval",
}
"""Tasks whose rule runs the answer as Python code, and by what. parse_expr is an eval too."""

_scorers: dict[tuple[str, str], Any] = {}
"""Of this process, by a task's name and options: some take seconds to make."""


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
        allows_eval: take tasks whose rule runs the answer as code.
    Raises:
        ConfigError: there is no such task, its rule runs the answer as code, or its generator refuses the options.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        options: Mapping[str, Mapping[str, Any]],
        *,
        seed: int,
        size: int,
        allows_eval: bool = False,
    ) -> None:
        for name in options:
            if name not in tasks:
                raise ConfigError(f"task_options are given for {name!r}, which is not among tasks={list(tasks)}")
        self.size = size
        self._tasks = [
            (name, create(name, options.get(name, {}), seed=seed, size=size, allows_eval=allows_eval)) for name in tasks
        ]

    def problem(self, index: int) -> Problem:
        """The index-th problem."""
        turn, place = index % len(self._tasks), index // len(self._tasks) % self.size
        name, dataset = self._tasks[turn]
        entry = dataset[place]
        return Problem(name, entry["question"], entry)


def score(name: str, options: Mapping[str, Any], entry: Mapping[str, Any], text: str) -> float:
    """What a task pays for the answer in a reply, 0 to 1; 0 without an answer. For a process of its own: a rule may hang."""
    answer = extract_answer(text)
    if answer is None:
        return 0.0
    key = (name, repr(options))
    if key not in _scorers:
        _scorers[key] = reasoning_gym.create_dataset(name, seed=0, size=1, **options)
    try:
        return min(1.0, max(0.0, float(_scorers[key].score_answer(answer, entry=entry))))
    # Some tasks' rules parse the answer and raise whatever their parser raises on what the policy wrote.
    except Exception as error:
        log.debug("%s cannot read the answer %r: %r", name, answer[:80], error)
        return 0.0


def create(name: str, options: Mapping[str, Any], *, seed: int, size: int, allows_eval: bool = False) -> Any:
    """The data set of a task.

    Raises:
        ConfigError: there is no such task, it refuses the options, or its rule runs the answer as code and
            allows_eval is off.
    """
    if name not in DATASETS:
        near = ", ".join(get_close_matches(name, DATASETS, n=3)) or "see reasoning_gym.factory.DATASETS"
        raise ConfigError(f"reasoning-gym has no task {name!r}; close: {near}")
    if name in EVALUATED_BY and not allows_eval:
        raise ConfigError(
            f"task {name!r} scores answers by {EVALUATED_BY[name]}, so that text of the policy runs as Python code with "
            "this user's rights; choose another task, or set allows_eval where nothing can be harmed, as in a container"
        )
    try:
        return reasoning_gym.create_dataset(name, seed=seed, size=size, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"task {name!r} refuses task_options={dict(options)}, size={size}: {error}") from error


def extract_answer(text: str) -> str | None:
    """What stands between the last <answer> and </answer>; None without."""
    found = ANSWER.findall(text)
    return str(found[-1]).strip() if found else None
