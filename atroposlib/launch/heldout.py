"""Held-out evaluations of a run, before and after training: the rewards, and what changed on the same items."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atroposlib.launch.jsonl import Line, read_jsonl

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray

RESAMPLES = 2000
SEED = 0
_ONLY = "all"
MIN_ITEMS = 10
"""Of each environment, for an interval: the spread of fewer items says too little about that of all."""


@dataclass(frozen=True)
class Change:
    """Of the mean held-out reward, with its 95 % interval."""

    mean: float
    low: float
    high: float
    items: int
    """In all environments."""

    def __str__(self) -> str:
        return f"{self.mean:+.3f}, 95 % {self.low:+.3f} to {self.high:+.3f}"


def heldout_rewards(folder: Path) -> dict[str, float]:
    """Held-out reward of each environment that was evaluated into this folder."""
    rewards = {}
    for name, path in _evaluations(folder).items():
        try:
            results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["results"]["all"]
            rewards[name] = float(results["heldout_reward"])
        except (ValueError, KeyError, TypeError):
            continue  # half written, or an environment that measures something else
    return rewards


def rewards_text(rewards: Mapping[str, float]) -> str:
    """Held-out rewards for people; a single environment goes without its name."""
    if rewards.keys() == {_ONLY}:
        return f"{rewards[_ONLY]:.3f}"
    return ", ".join(f"{name} {reward:.3f}" for name, reward in rewards.items())


def heldout_change(before: Path, after: Path) -> Change | None:
    """What changed from one evaluation to the other.

    None where an item of one has no counterpart in the other, by question and gold_answer of its sample, or an environment
    has fewer than MIN_ITEMS of them. Items are drawn in pairs, within each environment, whose means weigh the same.

    Source: Efron and Tibshirani 1993, "An introduction to the bootstrap", percentile intervals.
    """
    import numpy as np

    rewards = {folder: heldout_rewards(folder) for folder in (before, after)}
    if not rewards[after] or rewards[before].keys() != rewards[after].keys():
        return None
    paired = {name: _differences(before, after, name, rewards) for name in rewards[after]}
    known = [one for one in paired.values() if one is not None and len(one) >= MIN_ITEMS]
    if len(known) < len(paired):
        return None
    generator = np.random.default_rng(SEED)
    resampled = [one[generator.integers(len(one), size=(RESAMPLES, len(one)))].mean(axis=1) for one in known]
    low, high = np.quantile(np.mean(resampled, axis=0), (0.025, 0.975))
    mean = float(np.mean([one.mean() for one in known]))
    return Change(round(mean, 4), round(float(low), 4), round(float(high), 4), sum(map(len, known)))


def _differences(
    before: Path, after: Path, name: str, rewards: Mapping[Path, Mapping[str, float]]
) -> NDArray[float64] | None:
    """[items] after minus before; None where the samples are not those of the same items, or not what the mean is of."""
    import numpy as np

    paths = [_evaluations(folder)[name].with_name("samples.jsonl") for folder in (before, after)]
    samples = [sorted(read_jsonl(path), key=_item_of) for path in paths]
    items = [[_item_of(line) for line in lines] for lines in samples]
    if items[0] != items[1] or _item_of({}) in items[0]:
        return None
    columns = []
    for folder, lines in zip((before, after), samples, strict=True):
        values = [_reward_of(line) for line in lines]
        if not values or not math.isclose(math.fsum(values) / len(values), rewards[folder][name], abs_tol=1e-6):
            return None
        columns.append(np.array(values))
    difference: NDArray[float64] = columns[1] - columns[0]
    return difference


def _item_of(sample: Line) -> str:
    """What tells one item from another; a gold_answer may be any JSON."""
    return json.dumps([sample.get("question"), sample.get("gold_answer")], sort_keys=True)


def _reward_of(sample: Line) -> float:
    """What a sample adds to heldout_reward: its score, unless it says otherwise."""
    value = sample.get("heldout_reward", sample.get("score"))
    return float(value) if isinstance(value, int | float) else math.nan


def _evaluations(folder: Path) -> dict[str, Path]:
    """metrics.json of each environment; a single environment has no folder of its own."""
    return {path.parent.name if path.parent != folder else _ONLY: path for path in sorted(folder.rglob("metrics.json"))}
