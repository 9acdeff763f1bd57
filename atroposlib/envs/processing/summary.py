"""What `process` has done, in one line."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atroposlib.errors import RolloutError


@dataclass
class ProcessSummary:
    """Counts of one run of `process`."""

    path: Path
    groups_before: int = 0
    """Groups that an interrupted run had left in the file."""
    groups: int = 0
    sequences: int = 0
    reward_sum: float = 0.0
    dropped: Counter[str] = field(default_factory=Counter)
    """Items that gave nothing, by reason."""
    started: float = field(default_factory=time.monotonic)
    ended: float | None = None

    @property
    def groups_in_file(self) -> int:
        """Groups of this run and of those before it."""
        return self.groups_before + self.groups

    @property
    def mean_reward(self) -> float | None:
        """Over the sequences of this run; None where there are none."""
        return self.reward_sum / self.sequences if self.sequences else None

    def note(self, group: Mapping[str, Any]) -> None:
        """A group was written."""
        self.groups += 1
        self.sequences += len(group["scores"])
        self.reward_sum += float(sum(group["scores"]))

    def note_empty(self, error: Exception | None) -> None:
        """An item gave nothing."""
        if error is None:
            self.dropped["no group"] += 1
        else:
            self.dropped["rollout failed" if isinstance(error, RolloutError) else "environment error"] += 1

    def line(self) -> str:
        """For people."""
        seconds = (self.ended or time.monotonic()) - self.started
        before = f" after {self.groups_before} before" if self.groups_before else ""
        reward = "" if self.mean_reward is None else f", mean reward {self.mean_reward:.4f}"
        dropped = "".join(f", {count} items dropped: {reason}" for reason, count in sorted(self.dropped.items()))
        return (
            f"{self.groups} groups{before}, {self.sequences} sequences{reward}, {seconds:.1f} s{dropped}: {self.path}"
        )
