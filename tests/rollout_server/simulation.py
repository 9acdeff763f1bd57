"""A run played against the state machine under a simulated clock: stragglers, failures, crashes, publications that lag."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np

from atroposlib.wire.columns import Blob
from atroposlib.wire.layout import WIRE_VERSION, GroupHeader
from atroposlib.wire.models import EnvRequest, RunRequest, TicketRequest, TicketUpdate
from rollout_server.stores.base import NotReady, StoreLimits
from rollout_server.stores.payloads import MemoryPayloads
from rollout_server.stores.run_state import batches, groups, registry, runs, tickets
from rollout_server.stores.run_state.state import RunState


def a_blob(group_id: str, *, version: int | None, ticket: str | None, n: int, length: int = 1, env_id: int = 0) -> Blob:
    """What the state machine looks at, without an encoding."""
    header = GroupHeader(
        group_id=group_id,
        env_id=env_id,
        wire_version=WIRE_VERSION,
        ticket=ticket,
        oldest_version=version,
        newest_version=version,
    )
    columns = {"cu_seqlens": np.arange(n + 1, dtype=np.int32) * length, "tokens": np.zeros(n * length, np.int32)}
    return Blob(header=header, columns=columns, data=memoryview(b"payload"))


@dataclass
class Rollout:
    """A group that is being rolled out."""

    group_id: str
    version: int
    due_at: float
    fails: bool
    length: int


@dataclass
class Simulation:
    """Ticks of one second; a batch is trained in the tick in which it can be had.

    Args:
        straggler_factor: how much longer a straggler takes; its group is as much longer.
        crash_share: chance a tick that the environment, or the trainer, dies and starts again.
    """

    rng: random.Random
    batch_size: int = 4
    group_size: int = 2
    max_staleness: int = 2
    late_policy: str = "wait"
    workers: int = 6
    straggler_share: float = 0.0
    straggler_factor: float = 30.0
    failure_share: float = 0.0
    crash_share: float = 0.0
    publish_lag: int = 0
    now: float = 0.0
    generated: dict[str, int] = field(default_factory=dict)
    """Length of every group that the server took, by id."""
    trained: dict[int, list[str]] = field(default_factory=dict)
    """group_ids by step; a step trained again after a crash overwrites itself."""
    lengths: dict[str, int] = field(default_factory=dict)
    excess: list[int] = field(default_factory=list)
    """Versions over the bound, for each trained sequence that was."""

    def __post_init__(self) -> None:
        self.state = RunState(StoreLimits(ticket_ttl_s=1e9), MemoryPayloads().allocate, clock=lambda: self.now)
        self.in_flight: dict[str, Rollout] = {}
        self.committed = 0
        self._open_run()
        self._register()
        runs.set_policy(self.state, 0, self.session)

    def _open_run(self) -> None:
        request = RunRequest(
            run_name="run",
            batch_size=self.batch_size,
            max_staleness=self.max_staleness,
            late_policy=self.late_policy,  # type: ignore[arg-type]
            num_steps=10**6,
        )
        self.session = runs.open_run(self.state, request).session
        self.step = self.committed

    def _register(self) -> None:
        self.env_session = registry.register_env(self.state, EnvRequest(name="env", group_size=self.group_size)).session
        self.in_flight.clear()

    def tick(self) -> None:
        """One second."""
        self.now += 1
        if self.rng.random() < self.crash_share:
            self._register()
        if self.rng.random() < self.crash_share:
            self._open_run()
        self._start()
        self._arrive()
        self._train()
        runs.set_policy(self.state, max(0, self.step - self.rng.randint(0, self.publish_lag)), self.session)

    def _start(self) -> None:
        request = TicketRequest(
            env_id=0,
            session=self.env_session,
            sequences=self.group_size,
            count=max(1, self.workers - len(self.in_flight)),
        )
        if len(self.in_flight) >= self.workers:
            return
        for ticket in tickets.grant(self.state, request).tickets:
            factor = self.straggler_factor if self.rng.random() < self.straggler_share else 1.0
            duration = self.rng.uniform(1, 4) * factor
            fails = self.rng.random() < self.failure_share
            self.in_flight[ticket.ticket] = Rollout(
                f"g{ticket.ticket}", ticket.policy_version, self.now + duration, fails, max(1, int(duration))
            )

    def _arrive(self) -> None:
        for ticket, rollout in list(self.in_flight.items()):
            if rollout.due_at > self.now:
                continue
            del self.in_flight[ticket]
            if rollout.fails:
                update = TicketUpdate(env_id=0, session=self.env_session, tickets=[ticket], reason="rollout_error")
                tickets.give_back(self.state, update)
                continue
            blob = a_blob(
                rollout.group_id, version=rollout.version, ticket=ticket, n=self.group_size, length=rollout.length
            )
            self.lengths[rollout.group_id] = rollout.length
            result = groups.append(self.state, [blob], known=set(), is_strict=True)[0]
            if result.status == "accepted":
                self.generated[rollout.group_id] = rollout.length

    def _train(self) -> None:
        batch = batches.lease(self.state, self.step, self.session)
        if isinstance(batch, NotReady):
            return
        assert sum(group.n_sequences for group in batch) == self.batch_size
        for group in batch:
            assert group.oldest_version is not None
            over = self.step - group.oldest_version - self.max_staleness
            if over > 0:
                self.excess.append(over)
        self.trained[self.step] = [group.group_id for group in batch]
        self.step += 1
        batches.ack(self.state, self.step - 1, self.session, None)
        if self.step % 5 == 0 and self.step > self.committed:
            self.committed = self.step
            batches.commit(self.state, self.step, self.session)

    @property
    def trained_ids(self) -> list[str]:
        """In the order of steps."""
        return [group_id for step in sorted(self.trained) for group_id in self.trained[step]]

    @property
    def queued_ids(self) -> set[str]:
        """Accepted and waiting for a batch, or in one that is not trained yet."""
        formed = [group.group_id for step, batch in self.state.batches.items() for group in batch if step >= self.step]
        return {group.group_id for group in self.state.queue.in_order()} | set(formed)
