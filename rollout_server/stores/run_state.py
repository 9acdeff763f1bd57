"""The run as a state machine in memory: every decision, no waiting and no I/O.

Each method does one request. It raises its errors before its first change, so that a refused request changes nothing, and
notes in `changes` what must be written before anybody is answered.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from atroposlib.errors import (
    ConfigError,
    FencedError,
    GroupFormatError,
    NoRunError,
    ProtocolError,
    QueueFullError,
    StepError,
    UnknownEnvError,
)
from atroposlib.wire.columns import Blob
from atroposlib.wire.models import (
    EnvInfo,
    EnvRequest,
    GroupResult,
    InferenceServer,
    NackRequest,
    NackResult,
    RunInfo,
    RunRequest,
    Ticket,
    TicketGrant,
    TicketRequest,
    TicketUpdate,
)
from rollout_server.admission import Bound, Claim, fits, may_take
from rollout_server.batching import SEARCH_WINDOW, EnvShare, Wait
from rollout_server.planning import Scene, overfull_without, plan_next
from rollout_server.stores.base import NotReady, StoreLimits
from rollout_server.stores.changes import Changes, EnvRow, GroupRow, RunRow, Snapshot, TicketRow
from rollout_server.stores.in_flight import InFlight, TicketState
from rollout_server.stores.payloads import Place
from rollout_server.stores.queue import EnvCount, Queue, StoredGroup

log = logging.getLogger(__name__)


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
            group = _stored(group_row, group_row.place)
            if group_row.step is None:
                self.queue.add(group)
            else:
                self.batches.setdefault(group_row.step, []).append(group)
        for batch in self.batches.values():
            batch.sort(key=_batch_order)

    # The run and its trainer

    def open_run(self, request: RunRequest) -> RunInfo:
        """See Store.open_run; another run's state must have been put away before."""
        run = self.run
        if run is None:
            start = request.start_step or 0
            self._set_run(RunRow(uuid.uuid4().hex, request, 1, next_step=start, acknowledged=start, committed=start))
        else:
            self._check_resume(run, request)
            # A server that lost its folder starts at the trainer's step.
            next_step = max(run.next_step, request.start_step or 0)
            self._set_run(replace(run, request=request, session=run.session + 1, next_step=next_step))
        self.trainer_last_seen = self.clock()
        self.capacity_changed = self.queue_changed = True
        info = self.run_info()
        self._event(
            "run_opened", f"run {request.run_name}: trainer session {info.session}, {info.acknowledged_step} steps done"
        )
        return info

    @staticmethod
    def _check_resume(run: RunRow, request: RunRequest) -> None:
        if request.start_step is not None and request.start_step < run.committed:
            raise StepError(
                f"run {request.run_name!r} keeps the batches from step {run.committed} on; a trainer at step {request.start_step}"
                " cannot resume here: resume from the newest checkpoint, or choose a new run_name"
            )
        if request.batch_size != run.request.batch_size and run.next_step > run.committed:
            raise ConfigError(
                f"run {request.run_name!r} has batches of {run.request.batch_size} to replay; batch_size={request.batch_size}"
                " does not fit: keep it, or choose a new run_name"
            )

    def run_info(self) -> RunInfo:
        """See Store.run_info."""
        return self._run().info()

    def renew_trainer(self, session: int) -> None:
        """See Store.renew_trainer."""
        self._trainer(session)

    def set_policy(self, policy_version: int, session: int) -> None:
        """See Store.set_policy."""
        self._publish(self._trainer(session), policy_version)

    def _publish(self, run: RunRow, policy_version: int | None) -> RunRow:
        if policy_version is None or policy_version <= run.policy_version:
            return run
        self.capacity_changed = True
        self._event("policy_published", f"the inference servers run policy version {policy_version}")
        return self._set_run(replace(run, policy_version=policy_version))

    def _run(self) -> RunRow:
        if self.run is None:
            raise NoRunError("no trainer has opened a run yet; start atropos-trainer, or POST /v1/run")
        return self.run

    def _trainer(self, session: int) -> RunRow:
        run = self._run()
        if session != run.session:
            raise FencedError(
                f"run {run.request.run_name!r} was taken over: session {session} is over, {run.session} is the trainer now; stop this one"
            )
        self.trainer_last_seen = self.clock()
        return run

    def _set_run(self, run: RunRow) -> RunRow:
        self.run = self.changes.run = run
        return run

    def bound(self) -> Bound:
        """The staleness bound as it stands."""
        run = self._run()
        return Bound(run.request.batch_size, run.request.max_staleness, run.next_step)

    # Environments and inference servers

    def register_env(self, request: EnvRequest) -> EnvInfo:
        """See Store.register_env."""
        run = self._run()
        _check_group_size(run.request, request)
        known = {env.row.request.name: env_id for env_id, env in self.envs.items()}
        env_id = known.get(request.name, max(self.envs, default=-1) + 1)
        session = self.envs[env_id].row.session + 1 if env_id in self.envs else 1
        self._void(self.flight.of_env(env_id), reason="env_restarted")
        self._set_env(EnvState(EnvRow(env_id, request, session), self.clock()))
        self._event("env_joined", f"environment {request.name}: id {env_id}, session {session}")
        return EnvInfo(env_id=env_id, session=session, run=self.run_info())

    def touch_env(self, env_id: int) -> bool:
        """See Store.touch_env."""
        env = self.envs.get(env_id)
        if env is not None:
            env.last_seen = self.clock()
        return env is not None

    def disconnect_env(self, env_id: int) -> bool:
        """See Store.disconnect_env."""
        env = self.envs.get(env_id)
        if env is None:
            return False
        self._void(self.flight.of_env(env_id), reason="env_left")
        env.is_waiting = False
        env.row = self.changes.envs[env_id] = replace(env.row, is_connected=False)
        self.queue_changed = self.capacity_changed = True
        self._event("env_left", f"environment {env.row.request.name} said goodbye")
        return True

    def register_server(self, server: InferenceServer) -> None:
        """See Store.register_server."""
        known = self.servers.get(server.url)
        self.servers[server.url] = (server, self.clock())
        if known is None or known[0] != server:
            self.changes.servers = {url: entry for url, (entry, _) in self.servers.items()}

    def remove_server(self, url: str) -> bool:
        """See Store.remove_server."""
        if self.servers.pop(url, None) is None:
            return False
        self.changes.servers = {url: entry for url, (entry, _) in self.servers.items()}
        return True

    def _env(self, env_id: int, session: int) -> EnvState:
        env = self.envs.get(env_id)
        if env is None or env.row.session != session or not env.row.is_connected:
            raise UnknownEnvError(
                f"environment {env_id} session {session} is not known here; register again with POST /v1/envs"
            )
        env.last_seen = self.clock()
        return env

    def _set_env(self, env: EnvState) -> None:
        self.envs[env.row.env_id] = env
        self.changes.envs[env.row.env_id] = env.row

    def is_live(self, env: EnvState) -> bool:
        """Whether an environment is there to be waited for."""
        return env.row.is_connected and self.clock() - env.last_seen <= self.limits.env_timeout_s

    # Tickets

    def grant_tickets(self, request: TicketRequest) -> TicketGrant:
        """See Store.grant_tickets."""
        run = self._run()
        env = self._env(request.env_id, request.session)
        is_finished = run.acknowledged >= run.request.num_steps
        tickets: list[Ticket] = []
        while len(tickets) < request.count and not is_finished and self._may_start(run, env, request.sequences):
            ticket = uuid.uuid4().hex
            row = TicketRow(request.env_id, request.sequences, run.policy_version)
            self.flight.add(ticket, TicketState(row, self.clock() + self.limits.ticket_ttl_s))
            self.changes.tickets_added[ticket] = row
            tickets.append(
                Ticket(ticket=ticket, policy_version=run.policy_version, deadline_s=self.limits.ticket_ttl_s)
            )
        was_waiting, env.is_waiting = env.is_waiting, len(tickets) < request.count and not is_finished
        if was_waiting and not env.is_waiting:
            self.capacity_changed = True  # what the others may take depends on who waits
        return TicketGrant(
            tickets=tickets, policy_version=run.policy_version, step=run.acknowledged, is_finished=is_finished
        )

    def _may_start(self, run: RunRow, env: EnvState, sequences: int) -> bool:
        # Before the first publication nobody knows what the inference servers run.
        if run.policy_version < 0:
            return False
        left = max(0, run.request.num_steps - run.next_step) * run.request.batch_size
        places = left - self.queue.sequences - self.flight.sequences
        # Groups may come smaller than promised: the last places are given to one group at a time, even if it is too large.
        if places <= 0 or (places < sequences and self.flight.sequences > 0):
            return False  # the queue and the groups in flight already fill every step that is left
        bound = self.bound()
        if not fits(bound, self._pending(), version=run.policy_version, sequences=sequences):
            return False
        waiting = [
            other for other in self.envs.values() if other.is_waiting and other is not env and self.is_live(other)
        ]
        if not waiting:
            return True
        mine, *others = self._claims([env, *waiting])
        return may_take(mine, others, sequences=sequences, capacity=bound.capacity_until(run.policy_version))

    def _claims(self, envs: Sequence[EnvState]) -> list[Claim]:
        means = [self._tokens_per_sequence(env) for env in envs]
        is_measured = all(mean is not None for mean in means)
        return [
            Claim(
                env.row.request.weight,
                mean if is_measured and mean is not None else 1.0,
                _sequences(self.flight.by_env, env.row.env_id) + _sequences(self.queue.by_env, env.row.env_id),
            )
            for env, mean in zip(envs, means, strict=True)
        ]

    def _tokens_per_sequence(self, env: EnvState) -> float | None:
        sequences = self.counters[f"trained_sequences:{env.row.env_id}"]
        return self.counters[f"trained_tokens:{env.row.env_id}"] / sequences if sequences else None

    def renew_tickets(self, update: TicketUpdate) -> list[str]:
        """See Store.renew_tickets."""
        self._env(update.env_id, update.session)
        deadline = self.clock() + self.limits.ticket_ttl_s
        alive = [ticket for ticket in update.tickets if ticket in self.flight.tickets]
        for ticket in alive:
            self.flight.tickets[ticket].deadline = deadline
        return alive

    def return_tickets(self, update: TicketUpdate) -> list[str]:
        """See Store.return_tickets."""
        self._env(update.env_id, update.session)
        return self._void(update.tickets, reason=update.reason or "unused")

    def expire_tickets(self) -> int:
        """See Store.expire_tickets. Also wakes a batch that has waited long enough for an environment's minimum."""
        if any(env.lacking_since is not None for env in self.envs.values()):
            self.queue_changed = True
        return len(self._void(self.flight.late(self.clock()), reason="expired"))

    def _drop(self, ticket: str) -> bool:
        """Forget a ticket; False when it was void already."""
        if self.flight.remove(ticket):
            self.changes.tickets_dropped.append(ticket)
            return True
        return False

    def _void(self, tickets: Iterable[str], *, reason: str) -> list[str]:
        alive = [ticket for ticket in tickets if self._drop(ticket)]
        if alive:
            self._count(f"ticket:{reason}", len(alive))
            self.capacity_changed = self.queue_changed = True
            self._event("tickets_voided", f"{len(alive)} groups in flight were given up: {reason}")
        return alive

    # Groups

    def append(self, blobs: Sequence[Blob], *, known: set[str], is_strict: bool) -> list[GroupResult]:
        """See Store.append.

        Args:
            known: those of the group_ids that the index already holds.
        """
        run = self._run() if is_strict else self.run
        if is_strict and run is not None:
            self._refuse_unknown_envs(blobs)
            _refuse_too_long(blobs, run.request.max_token_len)
        n_bytes = sum(len(blob.data) for blob in blobs)
        if self.queue.n_bytes + n_bytes > self.limits.max_queued_bytes:
            raise QueueFullError(
                f"{self.queue.n_bytes} bytes wait for the trainer, the limit is {self.limits.max_queued_bytes}; try again later"
            )
        return [self._append_one(run, blob, known) for blob in blobs]

    def _refuse_unknown_envs(self, blobs: Sequence[Blob]) -> None:
        for blob in blobs:
            if blob.header.env_id not in self.envs:
                raise UnknownEnvError(
                    f"group {blob.header.group_id!r} names environment {blob.header.env_id}, which is not registered; POST /v1/envs first"
                )

    def _append_one(self, run: RunRow | None, blob: Blob, known: set[str]) -> GroupResult:
        header = blob.header
        if header.group_id in known or header.group_id in self.unsaved_ids:
            self._count("groups_duplicate")
            return GroupResult(group_id=header.group_id, status="duplicate")
        on_time = header.ticket is not None and self._drop(header.ticket)
        reason = self._why_not(run, blob, on_time=on_time)
        order_version = header.oldest_version
        if order_version is None:
            order_version = max(run.policy_version, 0) if run is not None else 0
        place = self.allocate(len(blob.data)) if reason is None else None
        row = GroupRow(
            self.next_key, header.group_id, header.env_id, blob.n_sequences, blob.n_tokens, header.oldest_version,
            order_version, place, retired=reason,
        )  # fmt: skip
        self.next_key += 1
        self.changes.groups.append(row)
        self.unsaved_ids.add(header.group_id)
        self.capacity_changed = self.queue_changed = True
        env = self.envs.get(header.env_id)
        if env is not None:
            env.last_seen, env.lacking_since = self.clock(), None
        if place is None:
            self._count(f"retired:{reason}")
            return GroupResult(group_id=header.group_id, status="retired", reason=reason)
        self.changes.payloads.append((place, blob.data))
        self.latest = _stored(row, place)
        self.queue.add(self.latest)
        self._count("groups_accepted")
        self._count(f"env:{header.env_id}")
        return GroupResult(group_id=header.group_id, status="accepted")

    def _why_not(self, run: RunRow | None, blob: Blob, *, on_time: bool) -> str | None:
        """Why a group can no longer be trained within the bound; None when it can."""
        header = blob.header
        if header.run_id is not None and (run is None or header.run_id != run.run_id):
            return "other_run"
        version = header.oldest_version
        if version is None or run is None:
            return None
        bound = self.bound()
        # A group whose ticket was void has lost its place; it may still find a free one.
        is_in_time = on_time or fits(bound, self._pending(), version=version, sequences=blob.n_sequences)
        if is_in_time and not bound.is_stale(version):
            return None
        if run.request.late_policy == "requeue":
            return "requeue"
        return "stale" if bound.is_stale(version) else "late"

    def _retire(self, group: StoredGroup, reason: str) -> None:
        """A group that is in no queue any more will never be trained."""
        self.changes.moved[group.key] = (None, reason)
        self.changes.released.append(group.place)
        self._count(f"retired:{reason}")

    def _pending(self) -> Counter[int]:
        """Sequences queued or in flight, by oldest version."""
        return self.queue.by_version + self.flight.sequences_by_version

    # Batches

    def lease(self, step: int, session: int) -> list[StoredGroup] | NotReady:
        """See Store.lease; the whole batch."""
        run = self._trainer(session)
        if step < run.committed or step > run.next_step:
            raise StepError(
                f"step {step} cannot be leased: steps {run.committed} to {run.next_step} can (committed, next to be formed)"
            )
        if step == run.next_step:
            if step >= run.request.num_steps:
                raise StepError(f"step {step} cannot be leased: the run has num_steps={run.request.num_steps}")
            waiting_for = self._form(run)
            self.trainer_waits_for = waiting_for
            if waiting_for is not None:
                return NotReady(waiting_for)
        self.trainer_waits_for = None
        return self.batches.get(step, [])

    def _form(self, run: RunRow) -> str | None:
        """Bind groups to the next step; says what is missing when there is no batch."""
        bound = self.bound()
        self._retire_stale(bound)
        if self.queue.sequences < bound.batch_size:
            return (
                f"{bound.batch_size - self.queue.sequences} more sequences for step {bound.next_step}"
                f" ({self.queue.sequences} of {bound.batch_size} queued, {len(self.flight.tickets)} groups in flight)"
            )
        plan = plan_next(self._scene(bound, is_patient=run.request.late_policy == "wait"))
        if isinstance(plan, Wait):
            if plan.is_for_minimum:
                self._note_who_lacks()
            return plan.waiting_for
        if plan.strands:
            self._give_up(bound, plan.groups, run.request.late_policy)
        self._bind(run, plan.groups)
        return None

    def _retire_stale(self, bound: Bound) -> None:
        stale = self.queue.stale(bound)
        for group in stale:
            self.queue.remove(group)
            self._retire(group, "stale")
        if stale:
            self._event("groups_retired", f"{len(stale)} groups went stale in the queue")

    def _scene(self, bound: Bound, *, is_patient: bool) -> Scene[StoredGroup]:
        return Scene(
            bound=bound,
            queued=self.queue.by_version,
            pending=self._pending(),
            flight=self.flight.groups_by_version,
            window=list(islice(self.queue.in_order(), bound.batch_size + SEARCH_WINDOW)),
            shares=self._shares(),
            is_patient=is_patient,
        )

    def _note_who_lacks(self) -> None:
        """From now on the batch's wait for an environment's minimum counts."""
        for env_id, env in self.envs.items():
            has_nothing = not _sequences(self.queue.by_env, env_id)
            if env.row.request.min_batch_allocation and has_nothing and env.lacking_since is None:
                env.lacking_since = self.clock()

    def _shares(self) -> dict[int, EnvShare]:
        now = self.clock()
        return {
            env_id: EnvShare(
                weight=env.row.request.weight,
                minimum=env.row.request.min_batch_allocation or 0.0,
                trained_tokens=self.counters[f"trained_tokens:{env_id}"],
                is_live=self.is_live(env)
                and (env.lacking_since is None or now - env.lacking_since < self.limits.allocation_wait_s),
            )
            for env_id, env in self.envs.items()
        }

    def _give_up(self, bound: Bound, batch: Sequence[StoredGroup], reason: str) -> None:
        """Void the oldest groups in flight until what stays behind the batch can be trained in time."""
        for ticket in self.flight.oldest_first():
            version = overfull_without(bound, self._pending(), batch)
            if version is None or all(other > version for other in self.flight.groups_by_version):
                break
            self._void([ticket], reason=reason)

    def _bind(self, run: RunRow, plan: list[StoredGroup]) -> None:
        step = run.next_step
        for group in plan:
            self.queue.remove(group)
            self.changes.moved[group.key] = (step, None)
            self._count(f"trained_tokens:{group.env_id}", group.n_tokens)
            self._count(f"trained_sequences:{group.env_id}", group.n_sequences)
        self.batches[step] = sorted(plan, key=_batch_order)
        self._set_run(replace(run, next_step=step + 1))
        self.capacity_changed = True
        self._event("batch_formed", f"batch of step {step}: {len(plan)} groups, {sum(g.n_tokens for g in plan)} tokens")

    def nack(self, step: int, request: NackRequest) -> NackResult:
        """See Store.nack."""
        run = self._trainer(request.session)
        if not run.acknowledged <= step < run.next_step:
            raise StepError(
                f"the batch of step {step} cannot be given back: formed and not acknowledged are steps {run.acknowledged}"
                f" to {run.next_step - 1}"
            )
        dissolved = [group for s in range(step, run.next_step) for group in self.batches.get(s, [])]
        unknown = set(request.retire) - {group.group_id for group in dissolved}
        if unknown:
            raise ProtocolError(f"retire names {sorted(unknown)[0]!r}, which is in no batch from step {step} on")
        retired = set(request.retire)
        for s in range(step, run.next_step):
            self.batches.pop(s, None)
        for group in dissolved:
            self._count(f"trained_tokens:{group.env_id}", -group.n_tokens)
            self._count(f"trained_sequences:{group.env_id}", -group.n_sequences)
            if group.group_id in retired:
                self._retire(group, f"nack_{request.reason}")
            else:
                self.changes.moved[group.key] = (None, None)
                self.queue.add(group)
        self._set_run(replace(run, next_step=step))
        self.capacity_changed = self.queue_changed = True
        result = NackResult(requeued=len(dissolved) - len(retired), retired=len(retired))
        self._event(
            "batch_nacked", f"batch of step {step} given back: {request.reason}; {result.retired} groups retired"
        )
        return result

    def ack(self, step: int, session: int, policy_version: int | None) -> None:
        """See Store.ack."""
        run = self._trainer(session)
        if step >= run.next_step:
            raise StepError(
                f"step {step} cannot be acknowledged: its batch was never handed out (next is {run.next_step}); lease it first"
            )
        run = self._publish(run, policy_version)
        if step >= run.acknowledged:
            self._set_run(replace(run, acknowledged=step + 1))
            self._event("step_acknowledged", f"step {step} is done")
        self.capacity_changed = True

    def commit(self, step: int, session: int) -> None:
        """See Store.commit."""
        run = self._trainer(session)
        if step > run.acknowledged:
            raise StepError(
                f"commit of step {step} comes before its acknowledgement (steps acknowledged: {run.acknowledged}); acknowledge it first"
            )
        if step > run.committed:
            self._set_run(replace(run, committed=step))
            for s in [s for s in self.batches if s < step]:
                self.changes.released += [group.place for group in self.batches.pop(s)]
            self._event("committed", f"a checkpoint holds the weights after {step} steps")

    def _count(self, name: str, amount: int = 1) -> None:
        self.counters[name] += amount
        self.changes.counters[name] = self.counters[name]

    def _event(self, kind: str, text: str) -> None:
        self.events.append((kind, text))

    def take_changes(self) -> Changes:
        """What must be written now; the next call gives what came after."""
        changes, self.changes = self.changes, Changes()
        return changes


def _sequences(by_env: Mapping[int, EnvCount], env_id: int) -> int:
    count = by_env.get(env_id)
    return count.sequences if count is not None else 0


def _stored(row: GroupRow, place: Place) -> StoredGroup:
    return StoredGroup(
        row.key, row.env_id, row.n_sequences, row.n_tokens, row.oldest_version, row.order_version, row.group_id, place
    )


def _batch_order(group: StoredGroup) -> tuple[int, int]:
    return group.order_version, group.key


def _check_group_size(run: RunRequest, request: EnvRequest) -> None:
    if run.group_size is not None and request.group_size != run.group_size:
        raise ConfigError(
            f"environment {request.name!r} has group_size={request.group_size}, the run wants {run.group_size};"
            f" set --group_size {run.group_size}"
        )


def _refuse_too_long(blobs: Sequence[Blob], limit: int) -> None:
    for blob in blobs:
        if 0 < limit < blob.longest_sequence:
            raise GroupFormatError(
                f"group {blob.header.group_id!r} holds a sequence of {blob.longest_sequence} tokens, the trainer takes at most"
                f" max_token_len={limit}; lower the environment's max_token_length"
            )
