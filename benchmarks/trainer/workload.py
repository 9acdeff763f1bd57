"""Batches with skewed lengths, the same for both trainers: random tokens, log-normal completion lengths, rewards 0 and 1."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Workload:
    """The shape of the steps."""

    steps: int = 4
    """The first warms up and is not counted."""
    groups: int = 8
    group_size: int = 8
    prompt_tokens: int = 32
    median_tokens: float = 64.0
    """Of a completion."""
    sigma: float = 0.9
    """Of the logarithm of its length."""
    max_tokens: int = 512
    zero_variance: float = 0.0
    """Share of groups whose rewards are all equal."""
    seed: int = 0

    @property
    def sequences(self) -> int:
        """Of a step."""
        return self.groups * self.group_size


@dataclass(frozen=True)
class Completion:
    """One sampled sequence."""

    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]
    """Of the completion's tokens, as an engine would report them."""
    reward: float


def steps_of(workload: Workload, *, vocabulary: int) -> list[list[Completion]]:
    """For each step its completions, group by group."""
    rng = np.random.default_rng(workload.seed)
    return [
        [one for group in range(workload.groups) for one in _group(rng, workload, group, vocabulary)]
        for _ in range(workload.steps)
    ]


def _group(rng: np.random.Generator, workload: Workload, group: int, vocabulary: int) -> list[Completion]:
    prompt_ids = rng.integers(100, vocabulary - 100, workload.prompt_tokens).tolist()
    is_flat = group < round(workload.zero_variance * workload.groups)
    lengths = np.exp(rng.normal(np.log(workload.median_tokens), workload.sigma, workload.group_size))
    return [
        Completion(
            prompt_ids=prompt_ids,
            completion_ids=rng.integers(100, vocabulary - 100, length).tolist(),
            logprobs=rng.normal(-8.0, 0.5, length).tolist(),
            reward=0.0 if is_flat else float(i % 2),
        )
        for i, length in enumerate(np.clip(lengths, 4, workload.max_tokens).astype(int).tolist())
    ]


def write(path: Path, workload: Workload, steps: list[list[Completion]]) -> None:
    """For a program in another environment."""
    path.write_text(
        json.dumps({"workload": asdict(workload), "steps": [[asdict(one) for one in step] for step in steps]})
    )
