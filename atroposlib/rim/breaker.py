"""Says when judges fail so often that what is left would be a biased reward. Pure, with an injected clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from atroposlib.rim.config import Breaker


class JudgeBreaker:
    """The last judgements: is scoring stopped, and for how long?

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, rules: Breaker, clock: Callable[[], float]) -> None:
        self._rules = rules
        self._clock = clock
        self._abstained: deque[bool] = deque(maxlen=rules.window)
        self._opened_at: float | None = None
        self.last_failure = ""
        """Why a judge abstained last."""

    def record(self, failure: str) -> bool:
        """One judgement: why the judge abstained, or "" where it gave a score. True: with it scoring stops."""
        self._abstained.append(bool(failure))
        self.last_failure = failure or self.last_failure
        is_full = len(self._abstained) == self._rules.window
        stops = not self.is_open and is_full and self.abstain_share > self._rules.max_abstain_share
        if stops:
            self._opened_at = self._clock()
        return stops

    @property
    def abstain_share(self) -> float:
        """Of the judgements that are looked at; 0 where there are none."""
        return sum(self._abstained) / len(self._abstained) if self._abstained else 0.0

    @property
    def is_open(self) -> bool:
        """Scoring is stopped, until `close`."""
        return self._opened_at is not None

    def pause_left_s(self) -> float:
        """Seconds until the judges should be tried again; 0 where they may be tried now."""
        if self._opened_at is None:
            return 0.0
        return max(0.0, self._opened_at + self._rules.pause_s - self._clock())

    def pause_again(self) -> None:
        """The judges were tried and still fail."""
        self._opened_at = self._clock()

    def close(self) -> None:
        """The judges are well: forget what was."""
        self._opened_at = None
        self._abstained.clear()

    def __str__(self) -> str:
        return (
            f"judges gave no score in {sum(self._abstained)} of the last {len(self._abstained)} judgements; "
            f"the last reason: {self.last_failure}"
        )
