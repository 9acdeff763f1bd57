"""Counts what an environment does, and turns the counts into metrics."""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

REWARD_WINDOW = 512


@dataclass
class EnvStats:
    """Counters of one environment process."""

    rounds: int = 0
    """Of admission."""
    groups_sent: int = 0
    sequences_sent: int = 0
    groups_dropped: Counter[str] = field(default_factory=Counter)
    """By reason: zero_variance, rollout_error, deadline, too_long, wrong_size, env_error, retired, ..."""
    rollouts_retried: int = 0
    finish_reasons: Counter[str] = field(default_factory=Counter)
    """Of all sequences, sent or not: stop, length, tool_calls, abort, ..."""
    rewards: deque[float] = field(default_factory=lambda: deque(maxlen=REWARD_WINDOW))
    """Of the newest sequences, dropped zero-variance groups included: what the policy earns, not what is trained on."""
    completion_tokens: deque[int] = field(default_factory=lambda: deque(maxlen=REWARD_WINDOW))
    _last_sampled_tokens: int = 0
    _last_busy_s: float = 0.0
    _last_time: float = field(default_factory=time.monotonic)

    def snapshot(self, *, sampled_tokens: int, busy_s: float) -> dict[str, Any]:
        """Metrics by name. tokens_per_s and busy_s are over the time since the last call.

        Args:
            sampled_tokens: completion tokens sampled since the process began.
            busy_s: seconds since then with at least one generation in flight.
        """
        now = time.monotonic()
        rate = (sampled_tokens - self._last_sampled_tokens) / max(now - self._last_time, 1e-6)
        newly_busy_s = busy_s - self._last_busy_s
        self._last_sampled_tokens, self._last_busy_s, self._last_time = sampled_tokens, busy_s, now
        return {
            "tokens_per_s": round(rate, 1),
            "busy_s": round(newly_busy_s, 3),
            "env/sampled_tokens": sampled_tokens,
            "env/groups_sent": self.groups_sent,
            "env/sequences_sent": self.sequences_sent,
            "env/groups_dropped": dict(self.groups_dropped),
            "env/finish_reasons": dict(self.finish_reasons),
            "env/rollouts_retried": self.rollouts_retried,
            "env/reward_mean": round(fmean(self.rewards), 5) if self.rewards else None,
            "env/completion_tokens_mean": round(fmean(self.completion_tokens), 2) if self.completion_tokens else None,
        }
