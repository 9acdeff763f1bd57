"""How long the mock takes and how it fails: what is drawn for one request."""

from __future__ import annotations

import math
import random
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b

from atroposlib.errors import ConfigError

MAX_PROMPTS_REMEMBERED = 1_000_000

FAULT_KINDS = {
    "refuse": "answer with HTTP 500",
    "drop": "reset the connection instead of an answer",
    "abort": "end every choice with finish_reason abort",
    "hang": "never answer",
    "truncate": "send half of the answer's body, then close",
    "misalign": "return one logprob too few",
}


@dataclass(frozen=True)
class Latency:
    """Seconds a generation takes: base, spread, length, stragglers.

    Args:
        base_s: median time to the whole answer.
        sigma: lognormal spread of base_s; 0.0 is constant, 0.8 is a real engine under load.
        per_token_s: added for each token of the longest choice.
        straggler_share: part of the requests that take straggler_factor times as long.
    """

    base_s: float = 0.0
    sigma: float = 0.0
    per_token_s: float = 0.0
    straggler_share: float = 0.0
    straggler_factor: float = 10.0

    def __post_init__(self) -> None:
        for item in fields(self):
            if getattr(self, item.name) < 0:
                raise ConfigError(f"latency {item.name} must not be negative, is {getattr(self, item.name)}")
        if self.straggler_share > 1:
            raise ConfigError(f"straggler_share is a part of all requests, 0 to 1, not {self.straggler_share}")

    @property
    def is_random(self) -> bool:
        """Whether two requests can take different times."""
        return self.sigma > 0 or self.straggler_share > 0

    def draw(self, rng: random.Random | None, n_tokens: int) -> float:
        """Seconds for one request whose longest choice has n_tokens."""
        seconds = self.base_s + self.per_token_s * n_tokens
        if rng is None:
            return seconds
        if self.sigma:
            seconds = self.base_s * math.exp(rng.gauss(0.0, self.sigma)) + self.per_token_s * n_tokens
        return seconds * (self.straggler_factor if rng.random() < self.straggler_share else 1.0)


@dataclass
class Faults:
    """Generations that go wrong next, in the order of the fields: exact, for tests."""

    drop: int = 0
    """Connections reset without an answer."""
    refuse: int = 0
    """Answers with HTTP 500."""
    abort: int = 0
    """Answers with finish_reason abort."""
    hang: int = 0
    """Requests that never get an answer."""
    truncate: int = 0
    """Answers cut in the middle of the body."""
    misalign: int = 0
    """Answers with one logprob too few."""

    def take(self) -> str | None:
        """The next one, which is used up."""
        for item in fields(self):
            if (left := getattr(self, item.name)) > 0:
                setattr(self, item.name, left - 1)
                return item.name
        return None


@dataclass(frozen=True)
class FaultRates:
    """Probability of each fault, for soak tests; FAULT_KINDS says what each one is."""

    drop: float = 0.0
    refuse: float = 0.0
    abort: float = 0.0
    hang: float = 0.0
    truncate: float = 0.0
    misalign: float = 0.0

    def __post_init__(self) -> None:
        rates = {item.name: getattr(self, item.name) for item in fields(self)}
        if min(rates.values()) < 0 or sum(rates.values()) > 1:
            raise ConfigError(f"fault rates are probabilities and add up to at most 1: {rates}")

    @property
    def total(self) -> float:
        """Probability that something goes wrong."""
        return float(sum(getattr(self, item.name) for item in fields(self)))

    def draw(self, rng: random.Random) -> str | None:
        """The fault of one request."""
        point = rng.random()
        for item in fields(self):
            point -= getattr(self, item.name)
            if point < 0:
                return item.name
        return None


class Dice:
    """Random numbers that depend on the seed, the prompt, and how often it was asked: the same in every run.

    The order in which different prompts arrive does not matter.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._asked: Counter[bytes] = Counter()

    def key(self, prompt_ids: Sequence[int], *, salt: int | None = None, is_greedy: bool = False) -> str:
        """Names one request; a greedy one has the same name each time."""
        digest = blake2b(array("q", prompt_ids).tobytes(), digest_size=12).digest()
        if len(self._asked) > MAX_PROMPTS_REMEMBERED:
            self._asked.clear()
        nth = 0 if is_greedy else self._asked[digest]
        if not is_greedy:
            self._asked[digest] += 1
        return f"{self._seed}/{salt}/{digest.hex()}/{nth}"
