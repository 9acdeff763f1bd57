"""How long the calls of judges take: drawn times, the critical path, and a replay of the same calls. Pure."""

from __future__ import annotations

import heapq
import math
import random
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

SPREAD = 0.3
"""Sigma of the lognormal latencies."""
LARGE_FACTOR = 2.0
"""How many times as long the large model takes."""
DOUBTED = 0.15
"""Share of the judgements that go to the large model."""


@dataclass
class CallTimes:
    """The calls so far, by case: one judge on one trajectory."""

    small: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Seconds of each call of the small model."""
    large: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Of the large one."""

    def critical_path_s(self, workers: int) -> float:
        """No schedule of the calls takes less: all of them over the workers, or the slowest case, whichever is longer."""
        work = sum(map(sum, self.small.values())) + sum(map(sum, self.large.values()))
        chains = [max(times) + sum(self.large.get(case, ())) for case, times in self.small.items()]
        return max(work / workers, *chains)

    def learnt_path_s(self, workers: int) -> float:
        """As critical_path_s where nobody knows what escalates: a case's first call shows it, then the others matter.

        Not a lower bound: with luck the right case is asked all at once.
        """
        if sum(map(len, self.small.values())) <= workers:
            return self.critical_path_s(workers)
        chains = [self.small[case][0] + max(self.small[case][1:]) + sum(large) for case, large in self.large.items()]
        return max(self.critical_path_s(workers), *chains, 0.0)

    def replay_s(self, workers: int) -> float:
        """The calls, those of cases that escalate first: each worker takes the next call as it ends one."""
        cases = sorted(self.small, key=lambda case: case not in self.large)
        small = [(case, seconds) for case in cases for seconds in self.small[case]]
        return replayed(small, {case: sum(times) for case, times in self.large.items()}, workers)


def drawn_s(case: str, temperature: float, *, is_large: bool, seed: int, median_s: float) -> float:
    """Seconds of a call: lognormal, by the call and not by the order of the calls, so that schedules can be compared.

    Args:
        median_s: of the small model's calls.
    """
    model = "large" if is_large else "small"
    drawn = random.Random(f"{seed}/{case}/{model}/{temperature}").gauss(0.0, SPREAD)
    return median_s * (LARGE_FACTOR if is_large else 1.0) * math.exp(drawn)


def is_doubted(case: str, seed: int) -> bool:
    """Whether the small model is unsure of a case, as it is of a share DOUBTED of them."""
    return zlib.crc32(f"{case}/{seed}".encode()) % 1000 < DOUBTED * 1000


def replayed(small: Sequence[tuple[str, float]], large: Mapping[str, float], workers: int) -> float:
    """Seconds until all is done, where a case's large call, before all small ones, follows the last small one of the case."""
    waiting = deque(small)
    left = Counter(case for case, _ in small)
    running: list[tuple[float, str]] = []
    now = 0.0
    while waiting or running:
        while waiting and len(running) < workers:
            case, seconds = waiting.popleft()
            heapq.heappush(running, (now + seconds, case))
        now, case = heapq.heappop(running)
        left[case] -= 1
        if left[case] == 0 and case in large:
            waiting.appendleft((case, large[case]))
    return now
