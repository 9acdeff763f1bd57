"""What is known of the run, the questions that every request begins with, and the changes that several requests share."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from atroposlib.errors import FencedError, NoRunError, UnknownEnvError
from atroposlib.wire.models import InferenceServer
from rollout_server.admission import Bound
from rollout_server.stores.base import StoreLimits
from rollout_server.stores.changes import Changes, EnvRow, RunRow, Snapshot
from rollout_server.stores.payloads import Place
from rollout_server.stores.run_state.in_flight import InFlight, TicketState
from rollout_server.stores.run_state.queue import Queue, StoredGroup, batch_order


@dataclass
class EnvState:
    """An environment and what is known of it while the server runs."""

    row: EnvRow
    last_seen: float
    """Unix time, seconds."""
    is_waiting: bool = False
    """Its last request for tickets was not met in full."""
    lacking_since: float | None = None
    """Since when a batch has waited for its minimum; None once it posts again."""


@dataclass
class RunState:
    """One run, or the time before the first.

    Args:
        limits: of the configuration.
        allocate: gives a place for a payload of so many bytes.
        clock: Unix time in seconds.
    """

    limits: StoreLimits
    allocate: Callable[[int], Place]
    clock: Callable[[], float] = time.time
    run: RunRow | None = None
    envs: dict[int, EnvState] = field(default_factory=dict)
    servers: dict[str, tuple[InferenceServer, float]] = field(default_factory=dict)
    """By URL, with the time each was last reported."""
    flight: InFlight = field(default_factory=InFlight)
    queue: Queue = field(default_factory=Queue)
    batches: dict[int, list[StoredGroup]] = field(default_factory=dict)
    """Formed and not committed, by step."""
    counters: Counter[str] = field(default_factory=Counter)
    next_key: int = 1
    trainer_last_seen: float | None = None
    trainer_waits_for: str | None = None
    latest: StoredGroup | None = None
    changes: Changes = field(default_factory=Changes)
    unsaved_ids: set[str] = field(default_factory=set)
    """group_ids in `changes`."""
    events: list[tuple[str, str]] = field(default_factory=list)
    capacity_changed: bool = False
    """Since somebody last cleared it: a group may start that could not before."""
    queue_changed: bool = False
    """Likewise: a batch may be complete that was not."""

    # Between the process and its journal

    def restore(self, snapshot: Snapshot) -> None:
        """Go on where an earlier process stopped."""
        now = self.clock()
        self.run, self.next_key = snapshot.run, snapshot.next_key
        self.counters.update(snapshot.counters)
        self.envs = {row.env_id: EnvState(row, now) for row in snapshot.envs}
        self.servers = {url: (server, now) for url, server in snapshot.servers.items()}
        for ticket, row in snapshot.tickets.items():
            # Whoever holds a ticket could not renew it while the server was down: the clock starts anew.
            self.flight.add(ticket, TicketState(row, now + self.limits.ticket_ttl_s))
        for group_row in snapshot.groups:
            assert group_row.place is not None
            group = StoredGroup.of(group_row, group_row.place)
            if group_row.step is None:
                self.queue.add(group)
            else:
                self.batches.setdefault(group_row.step, []).append(group)
        for batch in self.batches.values():
            batch.sort(key=batch_order)

    def take_changes(self) -> Changes:
        """What must be written now; the next call gives what came after."""
        changes, self.changes = self.changes, Changes()
        return changes

    # Questions: an answer or an error. Who asks is noted as alive, nothing else changes

    def require_run(self) -> RunRow:
        """The run. Raises NoRunError."""
        if self.run is None:
            raise NoRunError("no trainer has opened a run yet; start atropos-trainer, or POST /v1/run")
        return self.run

    def require_trainer(self, session: int) -> RunRow:
        """The run, for its trainer. Raises NoRunError, and FencedError for an earlier trainer."""
        run = self.require_run()
        if session != run.session:
            raise FencedError(
                f"run {run.request.run_name!r} was taken over: session {session} is over, {run.session} is the trainer now; stop this one"
            )
        self.trainer_last_seen = self.clock()
        return run

    def require_env(self, env_id: int, session: int) -> EnvState:
        """A connected environment. Raises UnknownEnvError, for an earlier session too."""
        env = self.envs.get(env_id)
        if env is None or env.row.session != session or not env.row.is_connected:
            raise UnknownEnvError(
                f"environment {env_id} session {session} is not known here; register again with POST /v1/envs"
            )
        env.last_seen = self.clock()
        return env

    def is_live(self, env: EnvState) -> bool:
        """Whether an environment is there to be waited for."""
        return env.row.is_connected and self.clock() - env.last_seen <= self.limits.env_timeout_s

    def bound(self) -> Bound:
        """The staleness bound as it stands. Raises NoRunError."""
        run = self.require_run()
        return Bound(run.request.batch_size, run.request.max_staleness, run.next_step)

    def pending(self) -> Counter[int]:
        """Sequences queued or in flight, by oldest version."""
        return self.queue.by_version + self.flight.sequences_by_version

    # Changes

    def set_run(self, run: RunRow) -> RunRow:
        """The run's row in its newest form, which is also returned."""
        self.run = self.changes.run = run
        return run

    def drop_ticket(self, ticket: str) -> bool:
        """Forget a ticket; False when it was void already."""
        if self.flight.remove(ticket):
            self.changes.tickets_dropped.append(ticket)
            return True
        return False

    def void_tickets(self, tickets: Iterable[str], *, reason: str) -> list[str]:
        """Give groups in flight up, counted by reason; returns the tickets that were alive."""
        alive = [ticket for ticket in tickets if self.drop_ticket(ticket)]
        if alive:
            self.count(f"ticket:{reason}", len(alive))
            self.capacity_changed = self.queue_changed = True
            self.note_event("tickets_voided", f"{len(alive)} groups in flight were given up: {reason}")
        return alive

    def retire(self, group: StoredGroup, reason: str) -> None:
        """A group that is in no queue any more will never be trained."""
        self.changes.moved[group.key] = (None, reason)
        self.changes.released.append(group.place)
        self.count(f"retired:{reason}")

    def count(self, name: str, amount: int = 1) -> None:
        """Add to a counter that outlives the process."""
        self.counters[name] += amount
        self.changes.counters[name] = self.counters[name]

    def note_event(self, kind: str, text: str) -> None:
        """Tell whoever watches, once the change is written."""
        self.events.append((kind, text))
