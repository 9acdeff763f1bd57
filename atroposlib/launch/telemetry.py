"""Where a running run stands: the rollout server's counters and the metrics files, read as they grow."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from atroposlib.client import RolloutClient
from atroposlib.errors import AtroposError
from atroposlib.launch.jsonl import JsonlTail, Line, surviving_history
from atroposlib.launch.processes import Child
from atroposlib.launch.run_folder import RunFolder
from atroposlib.wire.models import Status

STATUS_TIMEOUT_S = 2.0
# Sampling comes in bursts: its rate is taken over this long.
RATE_WINDOW_S = 30.0


class Telemetry:
    """What the view shows; refreshed by `poll`."""

    def __init__(self, folder: RunFolder, *, num_steps: int, children: Mapping[str, Child]) -> None:
        self.folder = folder
        self.num_steps = num_steps
        self.children = children
        self.phase = "starting"
        self.started_at = time.time()
        self.status: Status | None = None
        self.trainer_seen_at = 0.0
        """Unix time of the trainer's last call to the rollout server."""
        self.steps: list[Line] = []
        """Metrics of the surviving steps."""
        self.events: list[Line] = []
        """Of this session, newest last."""
        self._refreshed = asyncio.Event()
        self._env_seen_at: dict[str, float] = {}
        self._sampled: dict[str, deque[tuple[float, float]]] = defaultdict(deque)
        self._metrics_tail = JsonlTail(folder.metrics)
        self._env_tail = JsonlTail(folder.env_metrics)

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.steps)

    @property
    def eta_s(self) -> float | None:
        """Seconds to the last step at the pace of the latest ones; None before there are two."""
        recent = [float(line["time"]) for line in self.steps[-9:] if "time" in line]
        if len(recent) < 2 or self.step >= self.num_steps:
            return None
        # The median: a run that goes on has a gap as long as it lay still.
        pace_s = median(after - before for before, after in pairwise(recent))
        return max(0.0, pace_s * (self.num_steps - self.step) - (time.time() - recent[-1]))

    @property
    def sampling_tokens_per_s(self) -> float | None:
        """Of all environments together; None before the first tokens."""
        rates = [_rate(points) for points in self._sampled.values()]
        return sum(rates) if rates else None

    @property
    def training_tokens_per_s(self) -> float | None:
        """Prompt and completion, through forward and backward, of the latest step while it trained."""
        latest = self.latest
        tokens, seconds = latest.get("tokens/forward", latest.get("tokens/step")), latest.get("time/train_s")
        return float(tokens) / float(seconds) if tokens and seconds else None

    @property
    def latest(self) -> Line:
        """Metrics of the latest step; empty before it."""
        return self.steps[-1] if self.steps else {}

    def series(self, key: str) -> list[float]:
        """A metric over the steps that have it."""
        return [float(line[key]) for line in self.steps if isinstance(line.get(key), int | float)]

    def waits_for(self, child: Child) -> str:
        """What this process waits for or does, in the user's words."""
        if child.waits_for or self.status is None or child.state != "running":
            return child.waits_for
        status = self.status
        match child.name:
            case "trainer":
                return status.trainer_waits_for or f"trains step {min(self.step + 1, self.num_steps)}"
            case "rollout-server":
                return f"{status.queued_groups} groups queued" if status.queued_groups else "waits for groups"
            case "inference":
                version = status.policy_version
                return f"serves policy version {version}" if version >= 0 else "waits for the first weights"
            case name if name.startswith("inference-"):
                return "serves a model that is not trained"
            case name if name.startswith("env-"):
                if status.tickets_outstanding:
                    return f"rolls out {status.tickets_outstanding} groups"
                return "waits for the trainer: the staleness bound is reached"
        return ""

    def read_files(self) -> None:
        """Take in what the processes have written since the last call."""
        if new := self._metrics_tail.new_lines():
            self.steps = surviving_history([*self.steps, *new])
        for line in self._env_tail.new_lines():
            if isinstance(tokens := line.get("env/sampled_tokens"), int | float):
                self._take_sampled(str(line.get("env", "")), float(line.get("time", time.time())), float(tokens))

    async def poll(self, url: str, *, every_s: float = 0.5) -> None:
        """Refresh for ever. A server that does not answer leaves the last state standing."""
        async with RolloutClient(url, deadline_s=STATUS_TIMEOUT_S) as client:
            while True:
                with contextlib.suppress(AtroposError, TimeoutError):
                    self._take_status(await asyncio.wait_for(client.status(), STATUS_TIMEOUT_S))
                self.read_files()
                self._refreshed.set()
                self._refreshed = asyncio.Event()
                await asyncio.sleep(every_s)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what a refresh brings."""
        while not condition():
            await self._refreshed.wait()

    def _take_status(self, status: Status) -> None:
        self.status = status
        if status.trainer_last_seen_s is not None:
            self.trainer_seen_at = time.time() - status.trainer_last_seen_s
        self._env_seen_at = {env.name: time.time() - env.last_seen_s for env in status.envs}

    def _take_sampled(self, env: str, at: float, tokens: float) -> None:
        points = self._sampled[env]
        if points and tokens < points[-1][1]:
            points.clear()  # the environment was started again and counts from 0
        points.append((at, tokens))
        while at - points[0][0] > RATE_WINDOW_S:
            points.popleft()

    def env_seen_at(self, name: str) -> float:
        """Unix time of the environment's last call to the rollout server; 0 before it."""
        return self._env_seen_at.get(name, 0.0)

    def on_event(self, event: dict[str, Any]) -> None:
        """Remember an event for the view."""
        self.events.append(event)


def _rate(points: Sequence[tuple[float, float]]) -> float:
    """Growth a second, from the first of the points to the last."""
    seconds = points[-1][0] - points[0][0]
    return (points[-1][1] - points[0][1]) / seconds if seconds > 0 else 0.0
