"""Who gets weights, what the registry is told, and how a server that fails is left alone and tried again."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.client import RolloutClient
from atroposlib.errors import ServerUnreachableError
from atroposlib.wire.models import InferenceServer, InferenceServerStatus
from tests.processes import RolloutServerProcess, free_port
from tests.trainer.weight_sync.fake_vllm import FakeVllm
from tests.trainer.weight_sync.publications import WEIGHTS
from trainer.weight_sync.engines.vllm import VllmControl
from trainer.weight_sync.errors import ServerSyncError, WeightSyncError
from trainer.weight_sync.membership import KnownServer, Membership, PoolLimits, decide_membership
from trainer.weight_sync.pool import Pool
from trainer.weight_sync.pooled_publisher import PooledPublisher
from trainer.weight_sync.publisher import WeightPublisher
from trainer.weight_sync.registry import RolloutRegistry
from trainer.weight_sync.results import PublishResult, ServerResult
from trainer.weight_sync.states import Edge

A, B, C = "http://a:9001", "http://b:9001", "http://c:9001"
LIMITS = PoolLimits(silent_after_s=30, failures=3, first_retry_s=10, longest_retry_s=60)


def an_entry(url: str, *, last_seen_s: float = 1.0, **facts: Any) -> InferenceServerStatus:
    return InferenceServerStatus(server=InferenceServer(url=url, **facts), last_seen_s=last_seen_s)


def decide(
    listed: Sequence[str] = (), registry: Sequence[InferenceServerStatus] = (), *, now: float = 0.0, version: int = 5,
    **known: KnownServer,
) -> Membership:  # fmt: skip
    by_url = {{"a": A, "b": B, "c": C}[name]: server for name, server in known.items()}
    return decide_membership(listed, registry, by_url, version=version, now=now, limits=LIMITS)


# Who is a member


def test_listed_servers_come_first_then_those_that_registered() -> None:
    assert decide([B], [an_entry(A), an_entry(f"{B}/v1")]).members == (B, A)


@pytest.mark.parametrize("role", ["frozen", "teacher", "judge"])
def test_only_policy_servers_get_weights_even_if_they_are_listed(role: str) -> None:
    membership = decide([A], [an_entry(A, role=role), an_entry(B, role=role)])

    assert membership.members == ()
    assert {A, B} == membership.refused.keys()
    assert role in membership.refused[A]


def test_a_registered_server_that_fell_silent_is_no_member_and_a_listed_one_is() -> None:
    membership = decide([A], [an_entry(A, last_seen_s=99), an_entry(B, last_seen_s=99), an_entry(C, last_seen_s=29)])

    assert membership.members == (A, C)
    assert "99 s" in membership.refused[B]


def test_a_server_that_keeps_missing_publications_rests_and_the_reason_is_named() -> None:
    failing = KnownServer(failures=3, failed_at=100.0, reason="/update_weights answered 500")

    membership = decide([A, B], a=failing, now=104.0)

    assert membership.members == (B,)
    assert "3 publications" in membership.quarantined[A]
    assert "next try in 6 s" in membership.quarantined[A]
    assert "/update_weights answered 500" in membership.quarantined[A]


def test_a_server_that_missed_one_is_tried_at_the_next() -> None:
    assert decide([A, B], a=KnownServer(failures=2, failed_at=100.0), now=100.0).members == (A, B)


@pytest.mark.parametrize(("failures", "rests_s"), [(3, 10), (4, 20), (5, 40), (6, 60), (400, 60)])
def test_the_rest_grows_with_each_failure_up_to_a_limit(failures: int, rests_s: float) -> None:
    failing = KnownServer(failures=failures, failed_at=100.0)

    assert decide([A, B], a=failing, now=100 + rests_s - 0.1).members == (B,)
    assert decide([A, B], a=failing, now=100 + rests_s).members == (A, B)


def test_where_all_would_rest_none_does() -> None:
    failing = KnownServer(failures=9, failed_at=100.0)

    membership = decide([A, B], a=failing, b=failing, now=100.0)

    assert membership.members == (A, B)
    assert membership.quarantined == {}


# Who must catch up


def test_a_server_that_is_new_was_restarted_or_missed_a_version_must_catch_up() -> None:
    current = KnownServer(version="5")

    assert decide([A], a=current).behind == ()
    assert decide([A]).behind == (A,), "nothing is known of it"
    assert decide([A], a=KnownServer(version="4")).behind == (A,)
    assert decide([], [an_entry(A, policy_version=5)], a=current).behind == ()
    assert decide([], [an_entry(A, policy_version=None)], a=current).behind == (A,), "it was restarted since"
    assert decide([A], version=-1).behind == (), "there is nothing to catch up with"


@st.composite
def pools(draw: st.DrawFn) -> tuple[list[str], list[InferenceServerStatus], dict[str, KnownServer], float]:
    urls = [A, B, C]
    registry = [
        an_entry(
            url,
            role=draw(st.sampled_from(["policy", "policy", "teacher"])),
            last_seen_s=draw(st.sampled_from([0.0, 30.0, 31.0])),
            policy_version=draw(st.sampled_from([None, 4, 5])),
        )
        for url in draw(st.lists(st.sampled_from(urls), unique=True))
    ]
    known = {
        url: KnownServer(draw(st.sampled_from([None, "4", "5"])), draw(st.integers(0, 5)), draw(st.integers(0, 50)))
        for url in draw(st.lists(st.sampled_from(urls), unique=True))
    }
    return draw(st.lists(st.sampled_from(urls), unique=True)), registry, known, float(draw(st.integers(0, 120)))


@given(pools())
def test_every_server_is_a_member_or_the_reason_why_not_is_told(
    pool: tuple[list[str], list[InferenceServerStatus], dict[str, KnownServer], float],
) -> None:
    listed, registry, known, now = pool
    found = decide_membership(listed, registry, known, version=5, now=now, limits=LIMITS)

    everyone = {*listed, *(entry.server.url for entry in registry)}
    assert sorted([*found.members, *found.quarantined, *found.refused]) == sorted(everyone)
    assert set(found.behind) <= set(found.members)
    assert found.members or not found.quarantined
    assert all(entry.server.role == "policy" for entry in registry if entry.server.url in found.members)
    assert all([*found.quarantined.values(), *found.refused.values()])


# The pool over several publications


class FakeRegistry:
    """FAKE of the rollout server's list."""

    def __init__(self, *entries: InferenceServerStatus) -> None:
        self.entries = list(entries)
        self.reported: list[InferenceServer] = []
        self.is_away = False

    def servers(self) -> list[InferenceServerStatus]:
        self._answer()
        return self.entries

    def report(self, servers: Sequence[InferenceServer]) -> None:
        self._answer()
        self.reported += servers

    def _answer(self) -> None:
        if self.is_away:
            raise ServerUnreachableError("connection refused")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def a_pool(clock: Clock, registry: FakeRegistry | None, *listed: str) -> Pool:
    return Pool(listed, registry, VllmControl, limits=LIMITS, clock=clock)


def members(pool: Pool) -> list[str]:
    return [control.url for control in pool.refresh()]


def a_result(version: int, *, ok: Sequence[str] = (), failed: Sequence[str] = ()) -> PublishResult:
    broken = [ServerResult(url, None, 0.0, ServerSyncError(url, Edge.SEND, "answered 500")) for url in failed]
    return PublishResult(version, 0.1, (*(ServerResult(url, str(version), 0.1) for url in ok), *broken))


def test_a_server_that_registers_joins_and_one_that_leaves_is_forgotten(clock: Clock) -> None:
    registry = FakeRegistry(an_entry(A))
    pool = a_pool(clock, registry)
    first = pool.refresh()

    registry.entries.append(an_entry(B))
    assert members(pool) == [A, B]
    assert pool.refresh()[0] is first[0], "its connections are kept"

    registry.entries = [an_entry(B)]
    assert members(pool) == [B]


def test_versions_are_reported_under_the_url_that_is_registered(clock: Clock) -> None:
    registry = FakeRegistry(an_entry(f"{A}/v1", model_name="smol", problem="it missed a publication"))
    pool = a_pool(clock, registry, B)
    pool.refresh()

    pool.note(a_result(7, ok=[A, B]))

    assert registry.reported == [
        InferenceServer(url=f"{A}/v1", model_name="smol", policy_version=7),
        InferenceServer(url=B, policy_version=7),
    ]
    registry.entries.append(an_entry(B, policy_version=7))
    assert pool.refresh()
    assert pool.membership.behind == (A,), "its entry still shows no version"


def test_a_failing_server_is_quarantined_reported_once_and_tried_again(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    registry = FakeRegistry(an_entry(A), an_entry(B, policy_version=3))
    pool = a_pool(clock, registry)
    for version in (4, 5, 6):
        assert members(pool) == [A, B]
        pool.note(a_result(version, ok=[A], failed=[B]))

    assert members(pool) == [A]
    assert "http://b:9001 is in quarantine" in caplog.text
    told = [server for server in registry.reported if server.url == B]
    assert [server.problem.split(":")[0] for server in told] == [
        "it missed a publication",
        "quarantined, it keeps missing publications",
    ]
    assert told[-1].policy_version == 3, "what it reports itself"

    clock.now = 10.0
    assert members(pool) == [A, B]
    pool.note(a_result(7, ok=[A, B]))
    assert registry.reported[-1] == InferenceServer(url=B, policy_version=7)
    assert members(pool) == [A, B]


def test_a_registry_that_is_away_changes_nothing(clock: Clock) -> None:
    registry = FakeRegistry(an_entry(A))
    pool = a_pool(clock, registry)
    assert members(pool) == [A]

    registry.is_away = True

    assert members(pool) == [A]
    pool.note(a_result(1, ok=[A]))


# With a publisher


class FakePublisher:
    """FAKE: every server takes the weights but those in `broken`."""

    def __init__(self) -> None:
        self.urls: list[str] = []
        self.broken: set[str] = set()
        self.published: list[tuple[int, list[str]]] = []

    def set_controls(self, controls: Sequence[Any]) -> None:
        self.urls = [control.url for control in controls]

    def attach(self) -> None:
        pass

    def publish(self, version: int, weights: Any) -> PublishResult:
        self.published.append((version, self.urls))
        ok = [url for url in self.urls if url not in self.broken]
        return a_result(version, ok=ok, failed=sorted(self.broken & set(self.urls))).checked()

    ensure_current = publish

    def close(self) -> None:
        pass


def test_each_publication_goes_to_who_is_there_then(clock: Clock) -> None:
    registry, inner = FakeRegistry(an_entry(A)), FakePublisher()
    publisher = PooledPublisher(inner, a_pool(clock, registry))
    publisher.attach()
    publisher.publish(0, [])
    registry.entries.append(an_entry(B))
    publisher.ensure_current(0, [])
    inner.broken = {B}
    for version in (1, 2, 3):
        publisher.publish(version, [])
    publisher.publish(4, [])
    publisher.close()

    assert inner.published == [(0, [A]), (0, [A, B]), (1, [A, B]), (2, [A, B]), (3, [A, B]), (4, [A])]


def test_a_lone_server_is_tried_every_time(clock: Clock) -> None:
    inner = FakePublisher()
    inner.broken = {A}
    publisher = PooledPublisher(inner, a_pool(clock, None, A))

    for version in range(6):
        with pytest.raises(WeightSyncError, match="no inference server runs"):
            publisher.publish(version, [])

    assert len(inner.published) == 6


def test_without_any_server_the_error_says_how_to_start_one(clock: Clock) -> None:
    publisher = PooledPublisher(FakePublisher(), a_pool(clock, FakeRegistry(an_entry(A, role="judge"))))

    with pytest.raises(WeightSyncError, match=r"registered as judge.*atropos inference MODEL --rollout-server"):
        publisher.publish(1, [])


# Against a real rollout server


def test_the_pool_follows_a_real_registry(rollout_server: RolloutServerProcess, clock: Clock) -> None:
    async def register() -> None:
        async with RolloutClient(rollout_server.url) as client:
            await client.register_server(InferenceServer(url=A, model_name="smol"))
            await client.register_server(InferenceServer(url=B, role="teacher"))

    asyncio.run(register())
    registry = RolloutRegistry(lambda: RolloutClient(rollout_server.url, deadline_s=3))
    pool = Pool([C], registry, VllmControl, limits=LIMITS, clock=clock)

    assert members(pool) == [C, A]
    pool.note(a_result(2, ok=[A], failed=[C]))

    entries = {entry.server.url: entry.server for entry in registry.servers()}
    assert entries[A] == InferenceServer(url=A, model_name="smol", policy_version=2)
    assert "failed to send: answered 500" in entries[C].problem
    assert entries[B].policy_version is None


def test_a_rollout_server_that_is_away_is_a_named_error_and_leaves_nothing_running(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.ERROR)
    registry = RolloutRegistry(lambda: RolloutClient(f"http://127.0.0.1:{free_port()}", deadline_s=0.1))
    before = threading.active_count()

    with pytest.raises(ServerUnreachableError, match=r"127\.0\.0\.1"):
        registry.servers()

    assert threading.active_count() == before


def test_a_server_that_is_away_between_two_publications_has_missed_none(clock: Clock) -> None:
    pool = a_pool(clock, FakeRegistry(an_entry(A), an_entry(B)))
    pool.refresh()
    pool.note(a_result(1, ok=[A, B]))
    away = ServerResult(B, None, 0.0, ServerSyncError(B, Edge.ATTACH, "connection refused"))
    for _ in range(5):
        pool.note(PublishResult(1, 0.1, (ServerResult(A, "1", 0.0), away)))

    assert members(pool) == [A, B]

    for version in (2, 3, 4):
        pool.note(PublishResult(version, 0.1, (ServerResult(A, str(version), 0.0), away)))
    assert members(pool) == [A]


def test_a_registered_url_that_is_none_fails_alone(
    clock: Clock, servers: list[FakeVllm], connected: Callable[..., WeightPublisher]
) -> None:
    registry = FakeRegistry(an_entry(servers[0].url), an_entry("http://engine:port"))
    publisher = PooledPublisher(connected([], timeout_s=5.0), a_pool(clock, registry))

    result = publisher.publish(1, WEIGHTS.items())

    publisher.close()
    (failed,) = result.failed
    assert "it is no URL" in str(failed.error)
    assert servers[0].version == "1"


def test_a_registry_whose_name_is_looked_up_forever_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.weight_sync.registry.CALL_S", 0.05)
    monkeypatch.setattr("trainer.weight_sync.registry.GRACE_S", 0.05)
    answered = threading.Event()

    class Slow:
        async def __aenter__(self) -> Any:
            # As getaddrinfo does: the loop cannot close before it is back.
            await asyncio.get_running_loop().run_in_executor(None, answered.wait, 20)

        async def __aexit__(self, *_: object) -> None: ...

    with pytest.raises(ServerUnreachableError, match="did not answer"):
        RolloutRegistry(Slow).servers()  # type: ignore[arg-type]
    assert not answered.is_set()
    answered.set()


def test_a_server_that_comes_back_after_it_left_begins_anew(clock: Clock) -> None:
    registry = FakeRegistry(an_entry(A), an_entry(B))
    pool = a_pool(clock, registry)
    left = pool.refresh()[1]
    for version in (1, 2, 3):
        pool.note(a_result(version, ok=[A], failed=[B]))
    assert members(pool) == [A]

    registry.entries = [an_entry(A)]
    pool.refresh()
    registry.entries.append(an_entry(B))
    assert members(pool) == [A, B]
    with pytest.raises(ServerSyncError, match="closed"):
        left.health(timeout_s=1)


# With the real publisher, over real gloo


def test_a_late_server_and_a_restarted_one_get_the_current_weights(
    clock: Clock, servers: list[FakeVllm], connected: Callable[..., WeightPublisher]
) -> None:
    first, late = servers
    registry = FakeRegistry(an_entry(first.url))
    publisher = PooledPublisher(connected([], timeout_s=5.0), a_pool(clock, registry))
    publisher.attach()
    publisher.publish(3, WEIGHTS.items())

    registry.entries.append(an_entry(late.url))
    publisher.ensure_current(3, WEIGHTS.items())
    first.restart()
    publisher.ensure_current(3, WEIGHTS.items())
    publisher.close()

    assert (first.version, late.version) == ("3", "3")
    assert first.weights.keys() == late.weights.keys() == WEIGHTS.keys()
    assert {server.url: server.policy_version for server in registry.reported} == {first.url: 3, late.url: 3}
