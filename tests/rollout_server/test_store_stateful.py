"""The same random calls on a durable store and on the state machine in memory: every answer, refusal and count is the same."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from atroposlib.errors import AtroposError
from atroposlib.wire.columns import decode_groups, encode_group, read_blobs
from atroposlib.wire.models import EnvRequest, GroupRecord, InferenceServer, NackRequest, TicketRequest, TicketUpdate
from rollout_server.stores.base import Batch, Shard, Store
from rollout_server.stores.embedded import EmbeddedStore
from rollout_server.stores.run_state.state import RunState
from tests.builders import a_group, a_run
from tests.rollout_server.conftest import Stores

LIMITS = {"ticket_ttl_s": 10.0, "env_timeout_s": 25.0, "allocation_wait_s": 15.0, "max_queued_bytes": 40_000}
EXAMPLES, CALLS = 25, 40
BUSY_CALLS = 250
ENVS = 3
PROFILE = settings(
    max_examples=EXAMPLES, stateful_step_count=CALLS, deadline=None, suppress_health_check=list(HealthCheck)
)
small = st.integers(0, 7)


@dataclass(frozen=True)
class Pair:
    """One thing that each store has named for itself."""

    subject: str
    reference: str
    env_id: int = 0
    version: int = 0


class Lockstep(RuleBasedStateMachine):
    """Plays calls on the subject and on the reference."""

    def __init__(self, kind: str, redis_url: str | None) -> None:
        super().__init__()
        self._runner = asyncio.Runner()
        self._folder = TemporaryDirectory()
        self._subjects = Stores(kind, Path(self._folder.name), redis_url)
        self._references = Stores("memory", Path(self._folder.name))
        self._references.clock = self._subjects.clock
        self.subject = self._await(self._subjects.open(**LIMITS))
        self.reference = self._await(self._references.open(**LIMITS))
        self.session = 0
        self.env_sessions: dict[int, int] = {}
        self.tickets: list[Pair] = []
        self.run_id: Pair | None = None
        self.posted: list[str] = []
        self.accepted: set[str] = set()

    def teardown(self) -> None:
        self._await(self._subjects.close_all())
        self._await(self._references.close_all())
        self._runner.close()
        self._folder.cleanup()

    def _await(self, awaitable: Awaitable[Any]) -> Any:
        async def wait() -> Any:
            async with asyncio.timeout(20):
                return await awaitable

        return self._runner.run(wait())

    def _outcome(self, store: Store, stores: Stores, call: Callable[[Store], Awaitable[Any]]) -> Any:
        """The answer, or the refusal as its type and text."""
        try:
            return self._await(call(store))
        except AtroposError as error:
            return type(error).__name__, str(error)
        finally:
            stores.set_clock(store)

    def both(
        self, call: Callable[[Store], Awaitable[Any]], other: Callable[[Store], Awaitable[Any]] | None = None
    ) -> Any:
        """Make a call on both; `other` where the names differ on the reference. Returns the two outcomes."""
        subject = self._outcome(self.subject, self._subjects, call)
        reference = self._outcome(self.reference, self._references, other or call)
        return subject, reference

    def same(
        self, call: Callable[[Store], Awaitable[Any]], other: Callable[[Store], Awaitable[Any]] | None = None
    ) -> Any:
        """As both, when the outcomes must be equal; returns the outcome."""
        subject, reference = self.both(call, other)
        assert subject == reference
        return subject

    def _records(self) -> list[GroupRecord]:
        page = self.same(lambda store: store.records())
        assert page.next is None
        records: list[GroupRecord] = page.records
        return records

    # The run and its trainer

    @initialize(
        batch_size=st.sampled_from([4, 6]),
        staleness=st.integers(0, 2),
        policy=st.sampled_from(["wait", "wait", "requeue", "drop"]),
    )
    def begin(self, batch_size: int, staleness: int, policy: Literal["wait", "requeue", "drop"]) -> None:
        self.open_run("a", batch_size, staleness, policy, 30, None)
        self.set_policy(0)
        for env_id in range(2):
            self.register_env(env_id, 2, 1.0, None)

    @rule(
        name=st.sampled_from(["a", "a", "a", "a", "b"]),
        batch_size=st.sampled_from([4, 4, 6]),
        staleness=st.integers(0, 2),
        policy=st.sampled_from(["wait", "requeue", "drop"]),
        num_steps=st.sampled_from([3, 30, 30]),
        start_step=st.sampled_from([None, None, 0, 2]),
    )
    def open_run(
        self,
        name: str,
        batch_size: int,
        staleness: int,
        policy: Literal["wait", "requeue", "drop"],
        num_steps: int,
        start_step: int | None,
    ) -> None:
        request = a_run(name, batch_size=batch_size, max_staleness=staleness, num_steps=num_steps).model_copy(
            update={"late_policy": policy, "start_step": start_step}
        )
        mine, other = self.both(lambda store: store.open_run(request))
        if isinstance(mine, tuple):
            assert mine == other
            return
        assert mine.model_copy(update={"run_id": ""}) == other.model_copy(update={"run_id": ""})
        if self.run_id != Pair(mine.run_id, other.run_id):
            self._forget_run()
            self.run_id = Pair(mine.run_id, other.run_id)
        self.session = mine.session
        self.same(lambda store: store.renew_trainer(self.session))

    def _forget_run(self) -> None:
        self.env_sessions.clear()
        self.tickets.clear()
        if self.run_id is not None:  # else the groups before the first run are adopted
            self.posted.clear()
            self.accepted.clear()

    @precondition(lambda self: len(self.posted) > 12)
    @rule(dice=st.integers(0, 9))
    def close_run(self, dice: int) -> None:
        if dice == 0:
            self.same(lambda store: store.close_run())
            self._forget_run()
            self.run_id = None

    @rule(version=st.integers(0, 6))
    def set_policy(self, version: int) -> None:
        self.same(lambda store: store.set_policy(version, self.session))

    # Environments and inference servers

    @rule(
        index=st.integers(0, ENVS - 1),
        group_size=st.integers(1, 3),
        weight=st.sampled_from([0.0, 1.0, 1.0, 3.0]),
        minimum=st.sampled_from([None, None, 0.25, 0.5]),
    )
    def register_env(self, index: int, group_size: int, weight: float, minimum: float | None) -> None:
        request = EnvRequest(name=f"env-{index}", group_size=group_size, weight=weight, min_batch_allocation=minimum)
        mine, other = self.both(lambda store: store.register_env(request))
        if isinstance(mine, tuple):
            assert mine == other
            return
        assert (mine.env_id, mine.session) == (other.env_id, other.session)
        self.env_sessions[mine.env_id] = mine.session

    @rule(
        what=st.sampled_from(["touch", "touch", "leave", "server", "server leaves", "old session"]),
        env_id=st.integers(0, ENVS),
        url=st.sampled_from(["http://a", "http://b"]),
    )
    def something_small(self, what: str, env_id: int, url: str) -> None:
        calls: dict[str, Callable[[Store], Awaitable[Any]]] = {
            "touch": lambda store: store.touch_env(env_id),
            "leave": lambda store: store.disconnect_env(env_id),
            "server": lambda store: store.register_server(InferenceServer(url=url, policy_version=env_id)),
            "server leaves": lambda store: store.remove_server(url),
            "old session": lambda store: store.renew_trainer(self.session - 1),
        }
        self.same(calls[what])

    # Tickets

    @rule(env_id=st.integers(0, ENVS - 1), sequences=st.sampled_from([1, 2, 2, 2, 3]), count=st.integers(1, 5))
    def grant(self, env_id: int, sequences: int, count: int) -> None:
        session = self.env_sessions.get(env_id, 1)
        request = TicketRequest(env_id=env_id, session=session, sequences=sequences, count=count)
        mine, other = self.both(lambda store: store.grant_tickets(request))
        if isinstance(mine, tuple):
            assert mine == other
            return
        assert mine.model_copy(update={"tickets": []}) == other.model_copy(update={"tickets": []})
        for ours, theirs in zip(mine.tickets, other.tickets, strict=True):
            assert (ours.policy_version, ours.deadline_s) == (theirs.policy_version, theirs.deadline_s)
            self.tickets.append(Pair(ours.ticket, theirs.ticket, env_id, ours.policy_version))

    @precondition(lambda self: self.tickets)
    @rule(first=small, count=st.integers(1, 3), action=st.sampled_from(["renew_tickets", "return_tickets"]))
    def update_tickets(self, first: int, count: int, action: str) -> None:
        chosen = self.tickets[first % len(self.tickets) :][:count]
        env_id = chosen[0].env_id
        session = self.env_sessions.get(env_id, 1)

        def update(tickets: list[str]) -> TicketUpdate:
            return TicketUpdate(env_id=env_id, session=session, tickets=tickets, reason="why")

        mine, other = self.both(
            lambda store: getattr(store, action)(update([pair.subject for pair in chosen])),
            lambda store: getattr(store, action)(update([pair.reference for pair in chosen])),
        )
        if isinstance(mine, tuple):
            assert mine == other
        else:
            assert [pair.subject in mine for pair in chosen] == [pair.reference in other for pair in chosen]

    @rule(seconds=st.sampled_from([1, 4, 11, 26]), is_swept=st.booleans())
    def time_passes(self, seconds: int, is_swept: bool) -> None:
        self._subjects.clock.advance(seconds)
        if is_swept:
            self.same(lambda store: store.expire_tickets())

    # Groups

    @rule(
        env_id=st.integers(0, ENVS - 1),
        groups=st.integers(1, 6),
        n=st.sampled_from([2, 2, 2, 1, 3]),
        keeps=st.integers(0, 2),
    )
    def an_environment_works(self, env_id: int, groups: int, n: int, keeps: int) -> None:
        """Some of its groups stay in flight."""
        if env_id not in self.env_sessions:
            self.register_env(env_id, 2, 1.0, None)
        self.grant(env_id, n, groups + keeps)
        for pair in [pair for pair in self.tickets if pair.env_id == env_id][keeps:]:
            self.tickets.remove(pair)
            self._post(pair, env_id, n, pair.version, run="none", is_strict=True)

    @precondition(lambda self: self.tickets)
    @rule(pick=small, n=st.sampled_from([2, 2, 2, 1, 3]), count=st.integers(1, 4))
    def post_with_tickets(self, pick: int, n: int, count: int) -> None:
        """As a well-behaved environment does; the tickets may have been void for a while."""
        for _ in range(min(count, len(self.tickets))):
            pair = self.tickets.pop(pick % len(self.tickets))
            self._post(pair, pair.env_id, n, pair.version, run="none", is_strict=True)

    @rule(
        env_id=st.integers(0, ENVS),
        n=st.integers(1, 4),
        version=st.sampled_from([None, None, 0, 1, 2, 3]),
        run=st.sampled_from(["none", "none", "right", "wrong"]),
        is_strict=st.booleans(),
    )
    def post_without_ticket(self, env_id: int, n: int, version: int | None, run: str, is_strict: bool) -> None:
        self._post(None, env_id, n, version, run=run, is_strict=is_strict)

    def _post(
        self, ticket: Pair | None, env_id: int, n: int, version: int | None, *, run: str, is_strict: bool
    ) -> None:
        group_id = f"g{len(self.posted)}"
        group = a_group(group_id, env_id=env_id, n=n, version=version, completion=1 + n)
        run_ids = {"none": (None, None), "wrong": ("x", "x"), "right": (None, None)}
        if self.run_id is not None:
            run_ids["right"] = (self.run_id.subject, self.run_id.reference)
        tickets = (ticket.subject, ticket.reference) if ticket is not None else (None, None)
        variants = [
            list(read_blobs(encode_group(replace(group, ticket=name, run_id=run_id))))
            for name, run_id in zip(tickets, run_ids[run], strict=True)
        ]
        results = self.same(
            lambda store: store.append(variants[0], is_strict=is_strict),
            lambda store: store.append(variants[1], is_strict=is_strict),
        )
        if isinstance(results, list):
            self.posted.append(group_id)
            self.accepted |= {result.group_id for result in results if result.status == "accepted"}

    @precondition(lambda self: self.posted)
    @rule(pick=st.integers(0, 100))
    def post_again(self, pick: int) -> None:
        group = a_group(self.posted[pick % len(self.posted)])
        blobs = list(read_blobs(encode_group(group)))
        results = self.same(lambda store: store.append(blobs, is_strict=False))
        assert isinstance(results, tuple) or results[0].status == "duplicate"

    # Batches

    @rule(steps=st.integers(1, 3), publishes=st.booleans())
    def the_trainer_works(self, steps: int, publishes: bool) -> None:
        for _ in range(steps):
            self.lease(0, 0, True)
            self.ack(publishes, 0)

    @rule(back=st.sampled_from([0, 0, 0, 0, 1, 2, -1]), rank=st.integers(0, 2), is_whole=st.booleans())
    def lease(self, back: int, rank: int, is_whole: bool) -> None:
        before = self._status()
        step = max(0, before["formed_steps"] - back)
        shard = Shard() if is_whole else Shard(rank, 3)
        outcome, other = self.both(lambda store: store.lease(step, self.session, shard))
        if not isinstance(outcome, Batch):
            assert outcome == other
            return
        assert isinstance(other, Batch)
        assert self._ids(outcome) == self._ids(other)
        if self._status()["formed_steps"] > before["formed_steps"]:
            self._check_new_batch(step, before["batch_size"], before["max_staleness"])

    def _ids(self, batch: Batch) -> list[str]:
        return [decode_groups(blob)[0].group_id for blob in batch.blobs]

    def _check_new_batch(self, step: int, batch_size: int, max_staleness: int) -> None:
        batch = [record for record in self._records() if record.step == step]
        assert sum(record.n_sequences for record in batch) == batch_size
        assert all(r.oldest_version is None or step - r.oldest_version <= max_staleness for r in batch)

    @rule(publishes=st.booleans(), skip=st.sampled_from([0, 0, 0, 1]))
    def ack(self, publishes: bool, skip: int) -> None:
        step = self._status()["step"] + skip
        self.same(lambda store: store.ack(step, self.session, step + 1 if publishes else None))

    @rule(back=st.sampled_from([0, 0, 1, -1]))
    def commit(self, back: int) -> None:
        step = max(0, self._status()["step"] - back)
        self.same(lambda store: store.commit(step, self.session))

    @rule(back=st.sampled_from([1, 1, 2, 0]), retire=st.booleans())
    def nack(self, back: int, retire: bool) -> None:
        step = max(0, self._status()["formed_steps"] - back)
        names = [record.group_id for record in self._records() if record.step == step][:1] if retire else []
        self.same(lambda store: store.nack(step, NackRequest(session=self.session, reason="nan", retire=names)))

    @rule(dice=st.integers(0, 2))
    def the_server_restarts(self, dice: int) -> None:
        if dice > 0 or not self._subjects.is_durable:
            return
        self.subject = self._await(self._subjects.reopen(self.subject, **LIMITS))
        if isinstance(self.subject, EmbeddedStore):
            assert isinstance(self.reference, EmbeddedStore)
            for store in (self.subject, self.reference):
                forget_what_no_journal_keeps(store.state, self._subjects.clock(), LIMITS["ticket_ttl_s"])

    # What holds after every call

    def _status(self) -> dict[str, Any]:
        mine, other = self.both(lambda store: store.status())
        for status in (mine, other):
            status.inference_servers.sort(key=lambda entry: entry.server.url)
        assert mine.model_copy(update={"run_id": None}) == other.model_copy(update={"run_id": None})
        facts: dict[str, Any] = mine.model_dump()
        return facts

    @invariant()
    def every_group_is_somewhere_once_and_every_count_adds_up(self) -> None:
        status, records = self._status(), self._records()
        names, places = [record.group_id for record in records], [record.state for record in records]
        known = {env["env_id"] for env in status["envs"]}
        of_others = sum(record.state == "queued" and record.env_id not in known for record in records)

        assert sorted(names) == sorted(self.posted)
        assert self.accepted <= set(names)
        assert status["groups_accepted"] == len(self.accepted)
        assert status["queued_groups"] == places.count("queued")
        assert status["queued_groups"] == sum(env["queued_groups"] for env in status["envs"]) + of_others
        assert sum(status["groups_retired"].values()) == places.count("retired")
        assert status["tickets_outstanding"] == sum(env["tickets"] for env in status["envs"])
        assert all(record.step < status["formed_steps"] for record in records if record.step is not None)


def forget_what_no_journal_keeps(state: RunState, now: float, ticket_ttl_s: float) -> None:
    """Make a state as it is after a restart."""
    for ticket in state.flight.tickets.values():
        ticket.deadline = now + ticket_ttl_s
    for env in state.envs.values():
        env.last_seen, env.is_waiting, env.lacking_since = now, False, None
    state.servers = {url: (server, now) for url, (server, _) in state.servers.items()}
    state.trainer_last_seen = state.trainer_waits_for = state.latest = None


def play_a_busy_run(machine: Lockstep, rng: random.Random) -> None:
    """What a run is made of, and now and then what it is not: weighted, which rules cannot be."""
    plays: dict[Callable[[], None], float] = {
        lambda: machine.an_environment_works(
            rng.randrange(ENVS), rng.randint(1, 5), 2 if rng.random() < 0.95 else 1, rng.choice([0, 0, 0, 0, 1])
        ): 8,
        lambda: machine.the_trainer_works(rng.randint(1, 2), rng.random() < 0.95): 6,
        lambda: machine.lease(rng.choice([0, 0, 1, 2]), rng.randrange(3), rng.random() < 0.5): 2,
        lambda: machine.post_with_tickets(rng.randrange(8), 2, rng.randint(1, 3)) if machine.tickets else None: 2,
        lambda: machine.update_tickets(rng.randrange(8), 2, "renew_tickets") if machine.tickets else None: 1,
        lambda: machine.update_tickets(rng.randrange(8), 2, "return_tickets") if machine.tickets else None: 0.5,
        lambda: machine.post_without_ticket(
            rng.randrange(ENVS), 2, rng.choice([None, 0, 3, 5]), rng.choice(["none", "right", "wrong"]), False
        ): 0.5,
        lambda: machine.post_again(rng.randrange(100)) if machine.posted else None: 0.5,
        lambda: machine.grant(rng.randrange(ENVS), 2, 5): 1,
        lambda: machine.time_passes(rng.choice([1, 4, 11, 16]), rng.random() < 0.9): 2,
        lambda: machine.nack(rng.choice([1, 1, 2]), rng.random() < 0.5): 0.7,
        lambda: machine.commit(rng.choice([0, 1])): 1,
        lambda: machine.the_server_restarts(0): 0.3,
        lambda: machine.register_env(
            rng.randrange(ENVS), 2, rng.choice([1.0, 1.0, 3.0, 0.0]), rng.choice([None, None, 0.5])
        ): 0.3,
        lambda: machine.open_run(
            "a", 4, rng.choice([0, 1, 2]), rng.choice(["wait", "requeue", "drop"]), 1000, None
        ): 0.3,
    }
    machine.begin(4, 1, "wait")
    for play in rng.choices(list(plays), list(plays.values()), k=BUSY_CALLS):
        play()
        machine.every_group_is_somewhere_once_and_every_count_adds_up()


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("redis", marks=pytest.mark.redis)])
def test_a_store_behaves_as_the_state_machine_in_memory(kind: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue("valkey").url if kind == "redis" else None

    class OfThisKind(Lockstep):
        def __init__(self) -> None:
            super().__init__(kind, url)

    run_state_machine_as_test(OfThisKind, settings=PROFILE)


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("redis", marks=pytest.mark.redis)])
@pytest.mark.parametrize("seed", range(5))
def test_a_store_behaves_as_the_state_machine_in_a_busy_run(
    kind: str, seed: int, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue("valkey").url if kind == "redis" else None
    machine = Lockstep(kind, url)
    try:
        play_a_busy_run(machine, random.Random(seed))
        status = machine._status()
    finally:
        machine.teardown()

    assert status["formed_steps"] > 10, "too little happened to prove anything"
