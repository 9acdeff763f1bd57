"""One server's place in the pool: what it has in flight, what it may have, and how it has been doing."""

from __future__ import annotations

import asyncio
import random
import time
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from atroposlib.envs.server_handling.pool.adaptive_concurrency import Concurrency
from atroposlib.envs.server_handling.pool.balancing import Occupancy, usable_slots
from atroposlib.envs.server_handling.pool.circuit_breaker import Circuit, CircuitBreaker, trial_slots
from atroposlib.envs.server_handling.pool.waiting_line import Line

if TYPE_CHECKING:
    from atroposlib.envs.server_handling.server_baseline import APIServer

DEFAULT_TRAIN_SLOTS = 512
DEFAULT_EVAL_SLOTS = 64
DEFAULT_TIMEOUT_S = 1200.0


class Split(StrEnum):
    """What a request is for; each has its own limits."""

    TRAIN = "train"
    EVAL = "eval"


def split_of(kwargs: dict[str, Any]) -> Split:
    """The split that a request names; whatever is not training counts as evaluation."""
    return Split.TRAIN if kwargs.get("split", "train") == "train" else Split.EVAL


class Seat:
    """A server in the pool.

    Args:
        weight: this environment's share of the server, 0 to 1.
    """

    def __init__(self, server: APIServer, *, weight: float = 1.0) -> None:
        self.server = server
        self.weight = weight
        self.returns_tokens = bool(getattr(server, "returns_tokens", True))
        """Whether rollouts can be made here."""
        self.breaker = CircuitBreaker(time.monotonic, jitter=lambda: random.uniform(0.5, 1.0))
        self.concurrency = Concurrency(limit=self.ceiling)
        self.in_flight = dict.fromkeys(Split, 0)
        self.sessions = 0
        """Open conversations that come back here."""
        self.lines = {split: Line() for split in Split}
        """Requests of those conversations that wait for this server."""
        self.is_leaving = False
        self.reports_versions = False
        """Whether its answers have carried a policy version for every token."""
        self.drained = asyncio.Event()
        self.recovery: asyncio.Task[None] | None = None
        self.watch: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Where the server is, for messages and comparison."""
        config = getattr(self.server, "config", None)
        return str(getattr(config, "base_url", None) or "the default address").rstrip("/")

    @property
    def ceiling(self) -> int:
        """Training requests at once by its config."""
        return int(self._configured("num_max_requests_at_once", DEFAULT_TRAIN_SLOTS))

    @property
    def timeout_s(self) -> float:
        """Seconds that one request may take, by its config."""
        return self._configured("timeout", DEFAULT_TIMEOUT_S)

    @property
    def total_in_flight(self) -> int:
        """Requests of both splits."""
        return sum(self.in_flight.values())

    @property
    def takes_requests(self) -> bool:
        """Whether a request could go here once there is a free slot."""
        return not self.is_leaving and self.breaker.circuit is not Circuit.OPEN

    @property
    def is_marked_failed(self) -> bool:
        """Whether its client calls it unhealthy: a request failed there, by way of the pool or not."""
        return not getattr(self.server, "server_healthy", True)

    def slots(self, split: Split) -> int:
        """Requests of this split that may be in flight here now."""
        if not self.takes_requests:
            return 0
        limit = (
            min(self.concurrency.limit, self.ceiling)
            if split is Split.TRAIN
            else int(self._configured("num_requests_for_eval", DEFAULT_EVAL_SLOTS))
        )
        slots = usable_slots(limit, self.weight)
        return trial_slots(slots) if self.breaker.circuit is Circuit.HALF_OPEN else slots

    def occupancy(self, split: Split) -> Occupancy:
        """What the balancing sees."""
        return Occupancy(
            in_flight=self.in_flight[split],
            slots=self.slots(split),
            reserved=self.sessions if split is Split.TRAIN else 0,
            others_in_flight=self.total_in_flight - self.in_flight[split],
            is_suspect=self.is_marked_failed,
        )

    def _configured(self, name: str, default: float) -> float:
        # A hand-made stand-in for a server may have no config, or half of one.
        value = getattr(getattr(self.server, "config", None), name, default)
        return value if isinstance(value, int | float) else default
