"""Samples trained over the staleness bound when some rollouts are slow: counting admissions against our rule, in a simulation.

    python -m benchmarks.staleness --slow-share 0.01 --slow-factor 10

The counting rule starts a rollout while (bound + version + 1) * batch - (accepted + running) > 0 and trains the oldest
first; it is the rule of several systems in the field. Ours is the rollout server's own state machine, with each policy
for late work. All get the same kind of rollouts, 96 at a time, and a trainer that takes 2 s a step.
"""

from __future__ import annotations

import argparse
import heapq
import random
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from atroposlib.wire.columns import Blob
from atroposlib.wire.layout import WIRE_VERSION, GroupHeader
from atroposlib.wire.models import EnvRequest, LatePolicy, RunRequest, TicketRequest
from rollout_server.stores.base import NotReady, StoreLimits
from rollout_server.stores.payloads import MemoryPayloads
from rollout_server.stores.run_state import batches, groups, registry, runs, tickets
from rollout_server.stores.run_state.state import RunState

BATCH_SIZE = 32
CONCURRENT = 96
STEP_S = 2.0
ROLLOUT_S = (0.8, 1.6)
TICK_S = 0.1


class Rule(Protocol):
    """Decides which rollouts start and which are trained."""

    thrown_away: int
    """Finished rollouts that will not be trained."""

    def start(self, wanted: int) -> list[tuple[str, int]]:
        """Up to `wanted` rollouts: a name and the policy version of each."""

    def finish(self, name: str, version: int) -> None:
        """A rollout is there."""

    def batch(self) -> list[int] | None:
        """Policy versions of the samples of the next batch."""

    def trained(self) -> None:
        """The batch became a new policy version."""


@dataclass
class CountingRule:
    """Admissions are counted; nothing else."""

    bound: int
    version: int = 0
    accepted: int = 0
    running: int = 0
    thrown_away: int = 0
    queue: list[tuple[int, str]] = field(default_factory=list)

    def start(self, wanted: int) -> list[tuple[str, int]]:
        room = (self.bound + self.version + 1) * BATCH_SIZE - (self.accepted + self.running)
        started = max(0, min(wanted, room))
        self.running += started
        return [(f"{self.accepted + self.running + i}", self.version) for i in range(started)]

    def finish(self, name: str, version: int) -> None:
        self.running -= 1
        self.accepted += 1
        heapq.heappush(self.queue, (version, name))

    def batch(self) -> list[int] | None:
        if len(self.queue) < BATCH_SIZE:
            return None
        return [heapq.heappop(self.queue)[0] for _ in range(BATCH_SIZE)]

    def trained(self) -> None:
        self.version += 1


class FeasibilityRule:
    """The state machine of the rollout server."""

    def __init__(self, bound: int, late_policy: LatePolicy) -> None:
        self.thrown_away = 0
        self._state = RunState(StoreLimits(ticket_ttl_s=1e12), MemoryPayloads().allocate, clock=lambda: 0.0)
        run = RunRequest(
            run_name="simulation",
            batch_size=BATCH_SIZE,
            max_staleness=bound,
            num_steps=10**9,
            late_policy=late_policy,
        )
        self._session = runs.open_run(self._state, run).session
        self._env = registry.register_env(self._state, EnvRequest(name="env", group_size=1)).session
        runs.set_policy(self._state, 0, self._session)
        self._step = 0

    def start(self, wanted: int) -> list[tuple[str, int]]:
        if wanted < 1:
            return []
        request = TicketRequest(env_id=0, session=self._env, sequences=1, count=wanted)
        return [(ticket.ticket, ticket.policy_version) for ticket in tickets.grant(self._state, request).tickets]

    def finish(self, name: str, version: int) -> None:
        header = GroupHeader(
            group_id=name,
            env_id=0,
            wire_version=WIRE_VERSION,
            ticket=name,
            oldest_version=version,
            newest_version=version,
        )
        columns = {"cu_seqlens": np.array([0, 1], np.int32), "tokens": np.zeros(1, np.int32)}
        blob = Blob(header=header, columns=columns, data=memoryview(b"payload"))
        [result] = groups.append(self._state, [blob], known=set(), is_strict=True)
        self.thrown_away += result.status == "retired"

    def batch(self) -> list[int] | None:
        batch = batches.lease(self._state, self._step, self._session)
        return None if isinstance(batch, NotReady) else [group.order_version for group in batch]

    def trained(self) -> None:
        batches.ack(self._state, self._step, self._session, self._step + 1)
        self._step += 1
        batches.commit(self._state, self._step, self._session)


@dataclass(frozen=True)
class Outcome:
    """What a run of one rule came to."""

    share_over: float
    """Of the trained samples, those over the bound."""
    worst: int
    """Versions."""
    steps_per_s: float
    thrown_away: int


def simulate(rule: Rule, bound: int, *, steps: int, slow_share: float, slow_factor: float, seed: int) -> Outcome:
    """Train `steps` steps."""
    rng = random.Random(seed)
    running: list[tuple[float, str, int]] = []
    now, busy_until, version, over, worst = 0.0, 0.0, 0, 0, 0
    is_training = False
    while version < steps:
        for name, started_at in rule.start(CONCURRENT - len(running)):
            seconds = rng.uniform(*ROLLOUT_S) * (slow_factor if rng.random() < slow_share else 1.0)
            heapq.heappush(running, (now + seconds, name, started_at))
        while running and running[0][0] <= now:
            _, name, started_at = heapq.heappop(running)
            rule.finish(name, started_at)
        if is_training and now >= busy_until:
            rule.trained()
            version, is_training = version + 1, False
        if not is_training and (batch := rule.batch()) is not None:
            is_training, busy_until = True, now + STEP_S
            staleness = [version - sampled for sampled in batch]
            over += sum(value > bound for value in staleness)
            worst = max(worst, *staleness)
        now += TICK_S
    return Outcome(over / (steps * BATCH_SIZE), worst, steps / now, rule.thrown_away)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slow-share", type=float, default=0.01, help="rollouts that are slow (default: %(default)s)")
    parser.add_argument("--slow-factor", type=float, default=10.0, help="how much slower (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print("| bound | rule | trained over the bound | worst staleness | finished, not trained | steps/s |")
    print("|---|---|---|---|---|---|")
    for bound in (1, 2, 4):
        rules: dict[str, Rule] = {
            "counting": CountingRule(bound),
            "ours, wait": FeasibilityRule(bound, "wait"),
            "ours, drop": FeasibilityRule(bound, "drop"),
        }
        for name, rule in rules.items():
            found = simulate(
                rule,
                bound,
                steps=options.steps,
                slow_share=options.slow_share,
                slow_factor=options.slow_factor,
                seed=options.seed,
            )
            print(
                f"| {bound} | {name} | {found.share_over:.2%} | {found.worst} | {found.thrown_away} | {found.steps_per_s:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
