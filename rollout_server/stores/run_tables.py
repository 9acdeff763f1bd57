"""The tables of one run and what each request does to them. Synchronous, for one thread; no transaction of its own.

Every method raises its errors before its first write, so that a refused request changes nothing.
"""

from __future__ import annotations

import logging
import re
import sqlite3
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from atroposlib.errors import (
    ConfigError,
    FencedError,
    GroupFormatError,
    NoRunError,
    QueueFullError,
    StepError,
    UnknownEnvError,
)
from atroposlib.wire.columns import Blob
from atroposlib.wire.models import (
    EnvInfo,
    EnvRequest,
    EnvStatus,
    GroupRecord,
    GroupResult,
    RunInfo,
    RunRequest,
    Status,
    Ticket,
    TicketGrant,
    TicketRequest,
    TicketUpdate,
)
from rollout_server.admission import Bound
from rollout_server.stores.base import Batch, NotReady
from rollout_server.stores.index import QueueEntry, RunIndex, TicketEntry

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE run (
    id INTEGER PRIMARY KEY CHECK (id = 1), name TEXT NOT NULL, request TEXT NOT NULL, session INTEGER NOT NULL,
    policy_version INTEGER NOT NULL, next_step INTEGER NOT NULL, acknowledged INTEGER NOT NULL, committed INTEGER NOT NULL);
CREATE TABLE envs (
    env_id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, session INTEGER NOT NULL, request TEXT NOT NULL);
CREATE TABLE tickets (
    ticket TEXT PRIMARY KEY, env_id INTEGER NOT NULL, sequences INTEGER NOT NULL, policy_version INTEGER NOT NULL);
CREATE TABLE groups (
    key INTEGER PRIMARY KEY AUTOINCREMENT, group_id TEXT NOT NULL UNIQUE, env_id INTEGER NOT NULL,
    n_sequences INTEGER NOT NULL, n_tokens INTEGER NOT NULL, n_bytes INTEGER NOT NULL,
    oldest_version INTEGER, order_version INTEGER NOT NULL, step INTEGER, retired TEXT);
CREATE INDEX groups_step ON groups (step) WHERE step IS NOT NULL;
CREATE INDEX groups_queued ON groups (order_version, key) WHERE step IS NULL AND retired IS NULL;
CREATE TABLE payloads (key INTEGER PRIMARY KEY, blob BLOB NOT NULL);
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
"""


@dataclass
class _Run:
    """The one row of the run table."""

    request: RunRequest
    session: int
    policy_version: int = -1
    next_step: int = 0
    acknowledged: int = 0
    committed: int = 0

    def bound(self) -> Bound:
        return Bound(
            batch_size=self.request.batch_size,
            max_staleness=self.request.max_staleness,
            next_step=self.next_step,
        )

    def info(self) -> RunInfo:
        return RunInfo(
            run_name=self.request.run_name,
            session=self.session,
            policy_version=self.policy_version,
            committed_step=self.committed,
            acknowledged_step=self.acknowledged,
            request=self.request,
        )


@dataclass
class _Env:
    """An environment and when it was last heard of."""

    request: EnvRequest
    session: int
    last_seen: float


@dataclass
class _State:
    """What the writer thread keeps in memory; all of it can be read back from the tables."""

    run: _Run | None = None
    envs: dict[int, _Env] = field(default_factory=dict)
    index: RunIndex = field(default_factory=RunIndex)
    counters: Counter[str] = field(default_factory=Counter)
    trainer_last_seen: float | None = None
    trainer_waits_for: str | None = None


class RunTables:
    """The run that is open: its rows in SQLite and, beside them, what every request needs at once.

    Args:
        data_dir: holds run.sqlite, and archive/ with the databases of earlier runs.
        synchronous: SQLite's setting; normal survives SIGKILL, full a power cut too.
        ticket_ttl_s: seconds after which a ticket that is not renewed is void.
        max_queued_bytes: payload that may wait; beyond it append raises QueueFullError.
    """

    def __init__(
        self, data_dir: Path, *, synchronous: Literal["normal", "full"], ticket_ttl_s: float, max_queued_bytes: int
    ) -> None:
        self._data_dir = data_dir
        self._synchronous = synchronous
        self._ticket_ttl_s = ticket_ttl_s
        self._max_queued_bytes = max_queued_bytes
        self.capacity_changed = False
        """Since somebody last set it to False: a group may start that could not before."""
        self.queue_changed = False
        """Likewise: a batch may be complete that was not."""
        data_dir.mkdir(parents=True, exist_ok=True)
        self.db = self._open()
        self._state = self._load()

    def reload(self) -> None:
        """Forget what is in memory and read it back: after a transaction that was rolled back."""
        self._state = self._load()

    def run_info(self) -> RunInfo:
        """See Store.run_info."""
        return self._run().info()

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute(f"PRAGMA synchronous={self._synchronous.upper()}")
        db.execute("PRAGMA wal_autocheckpoint=4000")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version == 0:
            db.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;")
        elif version != SCHEMA_VERSION:
            raise ConfigError(
                f"{self._path} has schema version {version}, this server reads {SCHEMA_VERSION}; use another --data-dir"
            )
        return db

    @property
    def _path(self) -> Path:
        return self._data_dir / "run.sqlite"

    def _load(self) -> _State:
        state = _State()
        now = time.time()
        row = self.db.execute(
            "SELECT request, session, policy_version, next_step, acknowledged, committed FROM run"
        ).fetchone()
        if row is None:
            return state
        state.run = _Run(RunRequest.model_validate_json(row[0]), *row[1:])
        for env_id, session, request in self.db.execute("SELECT env_id, session, request FROM envs"):
            state.envs[env_id] = _Env(EnvRequest.model_validate_json(request), session, now)
        # Whoever holds a ticket could not renew it while the server was down: the clock starts anew.
        for ticket, env_id, sequences, version in self.db.execute(
            "SELECT ticket, env_id, sequences, policy_version FROM tickets"
        ):
            state.index.add_ticket(ticket, TicketEntry(env_id, sequences, version, now + self._ticket_ttl_s))
        queued = (
            "SELECT key, n_sequences, n_bytes, oldest_version, order_version FROM groups"
            " WHERE step IS NULL AND retired IS NULL ORDER BY order_version, key"
        )
        for entry in self.db.execute(queued):
            state.index.enqueue(QueueEntry(*entry))
        state.counters.update(dict(self.db.execute("SELECT name, value FROM counters")))
        return state

    # What each request does. Errors are raised before the first write.

    def _run(self) -> _Run:
        if self._state.run is None:
            raise NoRunError("no trainer has opened a run yet; start atropos-trainer, or POST /v1/run")
        return self._state.run

    def _trainer(self, session: int) -> _Run:
        run = self._run()
        if session != run.session:
            raise FencedError(
                f"run {run.request.run_name!r} was taken over: session {session} is over, {run.session} is the trainer now; stop this one"
            )
        self._state.trainer_last_seen = time.time()
        return run

    def _env(self, env_id: int, session: int) -> _Env:
        env = self._state.envs.get(env_id)
        if env is None or env.session != session:
            raise UnknownEnvError(
                f"environment {env_id} session {session} is not known here; register again with POST /v1/envs"
            )
        env.last_seen = time.time()
        return env

    def open_run(self, request: RunRequest) -> RunInfo:
        """See Store.open_run."""
        run = self._state.run
        if run is None or run.request.run_name != request.run_name:
            if run is not None:
                self._archive(run)
            start = request.start_step or 0
            run = _Run(request, session=1, next_step=start, acknowledged=start, committed=start)
        else:
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
            # A server that lost its folder starts at the trainer's step.
            next_step = max(run.next_step, request.start_step or 0)
            run = _Run(request, run.session + 1, run.policy_version, next_step, run.acknowledged, run.committed)
        self._state.run = run
        self._state.trainer_last_seen = time.time()
        self._save_run()
        self.capacity_changed = self.queue_changed = True
        log.info("run %s: trainer session %d, next step %d", request.run_name, run.session, run.next_step)
        return run.info()

    def _archive(self, run: _Run) -> None:
        """Put the database of an earlier run aside, so that the new one starts clean and nothing is destroyed."""
        self.db.execute("COMMIT")
        self.db.close()
        folder = self._data_dir / "archive"
        folder.mkdir(exist_ok=True)
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", run.request.run_name)[:80]
        self._path.rename(folder / f"{slug}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}.sqlite")
        self.db = self._open()
        self._state = self._load()
        self.db.execute("BEGIN IMMEDIATE")

    def _save_run(self) -> None:
        run = self._run()
        self.db.execute(
            "INSERT OR REPLACE INTO run VALUES (1, ?, ?, ?, ?, ?, ?, ?)",
            (
                run.request.run_name,
                run.request.model_dump_json(),
                run.session,
                run.policy_version,
                run.next_step,
                run.acknowledged,
                run.committed,
            ),
        )

    def register_env(self, request: EnvRequest) -> EnvInfo:
        """See Store.register_env."""
        run = self._run()
        expected = run.request.group_size
        if expected is not None and request.group_size != expected:
            raise ConfigError(
                f"environment {request.name!r} has group_size={request.group_size}, the run wants {expected}; set --group_size {expected}"
            )
        if run.request.batch_size % request.group_size:
            fitting = [size for size in range(1, run.request.batch_size + 1) if run.request.batch_size % size == 0]
            raise ConfigError(
                f"group_size={request.group_size} of environment {request.name!r} does not divide batch_size={run.request.batch_size};"
                f" use one of {fitting}"
            )
        known = {env.request.name: env_id for env_id, env in self._state.envs.items()}
        env_id = known.get(request.name, len(known))
        session = self._state.envs[env_id].session + 1 if env_id in self._state.envs else 1
        self.db.execute(
            "INSERT OR REPLACE INTO envs VALUES (?, ?, ?, ?)",
            (env_id, request.name, session, request.model_dump_json()),
        )
        self._state.envs[env_id] = _Env(request, session, time.time())
        self._void(
            [ticket for ticket, entry in self._state.index.tickets.items() if entry.env_id == env_id],
            reason="env_restarted",
        )
        log.info("environment %s: id %d, session %d", request.name, env_id, session)
        return EnvInfo(env_id=env_id, session=session, run=run.info())

    def grant_tickets(self, request: TicketRequest) -> TicketGrant:
        """See Store.grant_tickets."""
        run = self._run()
        self._env(request.env_id, request.session)
        is_finished = run.acknowledged >= run.request.num_steps
        tickets: list[Ticket] = []
        # Before the first publication nobody knows what the inference servers run.
        while run.policy_version >= 0 and not is_finished and len(tickets) < request.count:
            if not self._state.index.may_start(run.bound(), version=run.policy_version, sequences=request.sequences):
                break
            if self._is_enough(run, request.sequences):
                break
            ticket = uuid.uuid4().hex
            entry = TicketEntry(request.env_id, request.sequences, run.policy_version, time.time() + self._ticket_ttl_s)
            self.db.execute(
                "INSERT INTO tickets VALUES (?, ?, ?, ?)",
                (ticket, entry.env_id, entry.sequences, entry.policy_version),
            )
            self._state.index.add_ticket(ticket, entry)
            tickets.append(Ticket(ticket=ticket, policy_version=run.policy_version, deadline_s=self._ticket_ttl_s))
        return TicketGrant(
            tickets=tickets, policy_version=run.policy_version, step=run.acknowledged, is_finished=is_finished
        )

    def _is_enough(self, run: _Run, sequences: int) -> bool:
        """Whether the queue and the groups in flight already fill every step that is left."""
        left = max(0, run.request.num_steps - run.next_step) * run.request.batch_size
        in_flight = sum(entry.sequences for entry in self._state.index.tickets.values())
        return self._state.index.queued_sequences + in_flight + sequences > left

    def renew_tickets(self, update: TicketUpdate) -> list[str]:
        """See Store.renew_tickets."""
        self._env(update.env_id, update.session)
        deadline = time.time() + self._ticket_ttl_s
        alive = [ticket for ticket in update.tickets if ticket in self._state.index.tickets]
        for ticket in alive:
            self._state.index.tickets[ticket].deadline = deadline
        return alive

    def return_tickets(self, update: TicketUpdate) -> list[str]:
        """See Store.return_tickets."""
        self._env(update.env_id, update.session)
        return self._void(update.tickets, reason=update.reason or "unused")

    def expire_tickets(self) -> int:
        """See Store.expire_tickets."""
        now = time.time()
        late = [ticket for ticket, entry in self._state.index.tickets.items() if entry.deadline < now]
        return len(self._void(late, reason="expired"))

    def _void(self, tickets: Sequence[str], *, reason: str) -> list[str]:
        alive = [ticket for ticket in tickets if self._state.index.drop_ticket(ticket) is not None]
        if alive:
            self.db.executemany("DELETE FROM tickets WHERE ticket = ?", [(ticket,) for ticket in alive])
            self._count(f"ticket:{reason}", len(alive))
            self.capacity_changed = self.queue_changed = True
        return alive

    def append(self, blobs: Sequence[Blob]) -> list[GroupResult]:
        """See Store.append."""
        run = self._run()
        for blob in blobs:
            if blob.header.env_id not in self._state.envs:
                raise UnknownEnvError(
                    f"group {blob.header.group_id!r} names environment {blob.header.env_id}, which is not registered; POST /v1/envs first"
                )
        self._refuse_too_long(blobs, run.request.max_token_len)
        if self._state.index.queued_bytes + sum(len(blob.data) for blob in blobs) > self._max_queued_bytes:
            raise QueueFullError(
                f"{self._state.index.queued_bytes} bytes wait for the trainer, the limit is {self._max_queued_bytes}; try again later"
            )
        return [self._append_one(run, blob) for blob in blobs]

    @staticmethod
    def _refuse_too_long(blobs: Sequence[Blob], limit: int) -> None:
        for blob in blobs:
            cu_seqlens = blob.columns["cu_seqlens"]
            longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
            if 0 < limit < longest:
                raise GroupFormatError(
                    f"group {blob.header.group_id!r} holds a sequence of {longest} tokens, the trainer takes at most max_token_len={limit};"
                    " lower the environment's max_token_length"
                )

    def _append_one(self, run: _Run, blob: Blob) -> GroupResult:
        header = blob.header
        known = self.db.execute("SELECT 1 FROM groups WHERE group_id = ?", (header.group_id,)).fetchone()
        if known:
            self._count("groups_duplicate")
            return GroupResult(group_id=header.group_id, status="duplicate")
        on_time = header.ticket is not None and self._state.index.drop_ticket(header.ticket) is not None
        if on_time:
            self.db.execute("DELETE FROM tickets WHERE ticket = ?", (header.ticket,))
        reason = self._why_not(run, blob, on_time=on_time)
        order_version = header.oldest_version if header.oldest_version is not None else max(run.policy_version, 0)
        row = (
            header.group_id,
            header.env_id,
            blob.n_sequences,
            blob.n_tokens,
            len(blob.data),
            header.oldest_version,
            order_version,
            reason,
        )
        cursor = self.db.execute(
            "INSERT INTO groups (group_id, env_id, n_sequences, n_tokens, n_bytes, oldest_version, order_version, retired)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            row,
        )
        key = cursor.lastrowid or 0
        self.capacity_changed = self.queue_changed = True
        if reason is not None:
            self._count(f"retired:{reason}")
            return GroupResult(group_id=header.group_id, status="retired", reason=reason)
        self.db.execute("INSERT INTO payloads VALUES (?, ?)", (key, blob.data))
        self._state.index.enqueue(
            QueueEntry(key, blob.n_sequences, len(blob.data), header.oldest_version, order_version)
        )
        self._count("groups_accepted")
        self._count(f"env:{header.env_id}")
        return GroupResult(group_id=header.group_id, status="accepted")

    def _why_not(self, run: _Run, blob: Blob, *, on_time: bool) -> str | None:
        """Why a group can no longer be trained within the bound; None when it can."""
        version = blob.header.oldest_version
        if version is None:
            return None
        if run.bound().is_stale(version):
            return "stale"
        # A group whose ticket was void has lost its place; it may still find a free one.
        if not on_time and not self._state.index.may_start(run.bound(), version=version, sequences=blob.n_sequences):
            return "late"
        return None

    def lease(self, step: int, session: int) -> Batch | NotReady:
        """See Store.lease."""
        run = self._trainer(session)
        if step < run.committed or step > run.next_step:
            raise StepError(
                f"step {step} cannot be leased: steps {run.committed} to {run.next_step} can (committed, next to be formed)"
            )
        if step < run.next_step:
            self._state.trainer_waits_for = None
            return self._batch(step)
        if step >= run.request.num_steps:
            raise StepError(f"step {step} cannot be leased: the run has num_steps={run.request.num_steps}")
        for entry in self._state.index.stale(run.bound()):
            self.db.execute("UPDATE groups SET retired = 'stale' WHERE key = ?", (entry.key,))
            self.db.execute("DELETE FROM payloads WHERE key = ?", (entry.key,))
            self._state.index.dequeue(entry)
            self._count("retired:stale")
        chosen = self._state.index.next_batch(run.bound())
        if isinstance(chosen, str):
            self._state.trainer_waits_for = chosen
            return NotReady(chosen)
        self.db.executemany("UPDATE groups SET step = ? WHERE key = ?", [(step, entry.key) for entry in chosen])
        for entry in chosen:
            self._state.index.dequeue(entry)
        run.next_step += 1
        self._save_run()
        self.capacity_changed = True
        self._state.trainer_waits_for = None
        return self._batch(step)

    def _batch(self, step: int) -> Batch:
        rows = self.db.execute(
            "SELECT blob FROM groups JOIN payloads USING (key) WHERE step = ? ORDER BY order_version, key",
            (step,),
        )
        return Batch(step, [blob for (blob,) in rows])

    def ack(self, step: int, session: int, policy_version: int | None) -> None:
        """See Store.ack."""
        run = self._trainer(session)
        if step >= run.next_step:
            raise StepError(
                f"step {step} cannot be acknowledged: its batch was never handed out (next is {run.next_step})"
            )
        run.acknowledged = max(run.acknowledged, step + 1)
        if policy_version is not None:
            self._set_policy(run, policy_version)
        self._save_run()
        self.capacity_changed = True

    def commit(self, step: int, session: int) -> None:
        """See Store.commit."""
        run = self._trainer(session)
        if step > run.acknowledged:
            raise StepError(
                f"commit of step {step} comes before its acknowledgement (steps acknowledged: {run.acknowledged})"
            )
        if step > run.committed:
            run.committed = step
            self.db.execute("DELETE FROM payloads WHERE key IN (SELECT key FROM groups WHERE step < ?)", (step,))
            self._save_run()

    def set_policy(self, policy_version: int, session: int) -> None:
        """See Store.set_policy."""
        self._set_policy(self._trainer(session), policy_version)

    def _set_policy(self, run: _Run, policy_version: int) -> None:
        if policy_version > run.policy_version:
            run.policy_version = policy_version
            self._save_run()
            self.capacity_changed = True

    def _count(self, name: str, amount: int = 1) -> None:
        self._state.counters[name] += amount
        self.db.execute(
            "INSERT INTO counters VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + excluded.value",
            (name, amount),
        )

    def status(self) -> Status:
        """See Store.status."""
        state, run, now = self._state, self._state.run, time.time()
        if run is None:
            return Status()
        tickets = Counter(entry.env_id for entry in state.index.tickets.values())
        in_flight = sum(entry.sequences for entry in state.index.tickets.values())
        return Status(
            run_name=run.request.run_name,
            step=run.acknowledged,
            num_steps=run.request.num_steps,
            policy_version=run.policy_version,
            committed_step=run.committed,
            queued_groups=state.index.queued_groups,
            queued_sequences=state.index.queued_sequences,
            tickets_outstanding=len(state.index.tickets),
            admitted_sequences=run.next_step * run.request.batch_size + state.index.queued_sequences + in_flight,
            capacity_sequences=0
            if run.policy_version < 0
            else run.bound().batch_size * (run.policy_version + run.request.max_staleness + 1),
            groups_accepted=state.counters["groups_accepted"],
            groups_duplicate=state.counters["groups_duplicate"],
            groups_retired=_with_prefix(state.counters, "retired:"),
            tickets_returned=_with_prefix(state.counters, "ticket:"),
            trainer_last_seen_s=None if state.trainer_last_seen is None else now - state.trainer_last_seen,
            trainer_waits_for=state.trainer_waits_for,
            envs=[
                EnvStatus(
                    env_id=env_id,
                    name=env.request.name,
                    last_seen_s=now - env.last_seen,
                    tickets=tickets[env_id],
                    groups_accepted=state.counters[f"env:{env_id}"],
                )
                for env_id, env in state.envs.items()
            ],
        )

    def records(self) -> list[GroupRecord]:
        """See Store.records."""
        rows = self.db.execute(
            "SELECT group_id, env_id, n_sequences, n_tokens, oldest_version, step, retired FROM groups ORDER BY key"
        )
        return [
            GroupRecord(
                group_id=group_id,
                env_id=env_id,
                n_sequences=n_sequences,
                n_tokens=n_tokens,
                state="retired" if retired is not None else "queued" if step is None else "batched",
                step=step,
                oldest_version=oldest_version,
                reason=retired,
            )
            for group_id, env_id, n_sequences, n_tokens, oldest_version, step, retired in rows
        ]


def _with_prefix(counters: Counter[str], prefix: str) -> dict[str, int]:
    return {name.removeprefix(prefix): value for name, value in counters.items() if name.startswith(prefix)}
