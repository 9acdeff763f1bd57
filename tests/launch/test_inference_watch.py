"""When a pause is somebody's work and when it is an orphan, and what the rollout server is told meanwhile."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.errors import AtroposError, ServerUnreachableError
from atroposlib.launch.engine_look import EngineWindow, Look
from atroposlib.launch.inference_watch import InferenceWatch, Pause, is_orphaned, seen_pause
from atroposlib.launch.registration import Registration, joined_problem
from atroposlib.wire.models import InferenceServer, InferenceServerStatus

PAUSED = Look(is_healthy=True, is_paused=True, weight_version="3")
RUNNING = Look(is_healthy=True, is_paused=False, weight_version="3")
SILENT = Look(is_healthy=False)
URL = "http://gpu:9001"


def test_a_pause_counts_from_when_it_was_first_seen() -> None:
    pause = seen_pause(None, PAUSED, 10.0)

    assert seen_pause(pause, PAUSED, 50.0) == Pause(10.0, "3")
    assert seen_pause(pause, RUNNING, 50.0) is None


def test_an_engine_that_does_not_answer_is_still_paused_but_is_not_resumed() -> None:
    pause = Pause(10.0, "3")

    assert seen_pause(pause, SILENT, 500.0) == pause
    assert not is_orphaned(pause, SILENT, 500.0, max_pause_s=180)


def test_a_new_version_shows_a_trainer_at_work() -> None:
    later = Look(is_healthy=True, is_paused=True, weight_version="4")

    assert seen_pause(Pause(10.0, "3"), later, 150.0) == Pause(150.0, "4")


@pytest.mark.parametrize(("max_pause_s", "now", "expected"), [(180, 189.9, False), (180, 190, True), (0, 1e6, False)])
def test_a_pause_is_an_orphan_after_its_time(max_pause_s: float, now: float, expected: bool) -> None:
    assert is_orphaned(Pause(10.0, "3"), PAUSED, now, max_pause_s=max_pause_s) is expected


looks = st.builds(
    Look,
    is_healthy=st.just(True),
    is_paused=st.sampled_from([None, True, True, False]),
    weight_version=st.sampled_from(["1", "2"]),
)


@given(st.lists(st.tuples(looks, st.integers(1, 30)), min_size=1))
def test_an_engine_is_resumed_only_if_no_look_for_so_long_saw_it_run_or_change(steps: list[tuple[Look, int]]) -> None:
    pause, now = None, 0.0
    seen: list[tuple[float, Look]] = []
    for look, seconds in steps:
        now += seconds
        seen.append((now, look))
        pause = seen_pause(pause, look, now)
        if is_orphaned(pause, look, now, max_pause_s=60):
            recent = [past for at, past in seen if at >= now - 60]
            assert all(past.is_paused is not False for past in recent)
            assert len({past.weight_version for past in recent if past.is_paused}) == 1


class FakeEngine:
    """FAKE engine: each look is the next of a list, the last one for ever."""

    def __init__(self, *looks: Look, obeys: bool = True) -> None:
        self.looks = list(looks)
        self.obeys = obeys
        self.resumed = 0

    async def look(self) -> Look:
        return self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]

    async def resume(self) -> bool:
        self.resumed += 1
        if self.obeys:
            self.looks = [RUNNING]
        return self.obeys


class Stage:
    """A fake clock that moves with each sleep, and ends the watch at a given time."""

    def __init__(self, end_s: float) -> None:
        self.now, self.end_s = 0.0, end_s
        self.reports: list[tuple[float, Look, str]] = []

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.now > self.end_s:
            raise asyncio.CancelledError

    async def report(self, look: Look, problem: str) -> None:
        self.reports.append((self.now, look, problem))


async def watch(engine: FakeEngine, stage: Stage, max_pause_s: float = 180.0) -> None:
    watcher = InferenceWatch(
        engine, stage.report, max_pause_s=max_pause_s, look_every_s=2.0, clock=lambda: stage.now, sleep=stage.sleep
    )
    with pytest.raises(asyncio.CancelledError):
        await watcher.run()


async def test_an_orphan_pause_ends_and_is_told_loudly(caplog: pytest.LogCaptureFixture) -> None:
    engine, stage = FakeEngine(RUNNING, PAUSED), Stage(end_s=400)

    await watch(engine, stage)

    assert engine.resumed == 1
    assert "LEFT PAUSED for 180 s" in caplog.text
    assert not any(problem for _, _, problem in stage.reports)


async def test_a_pause_that_a_trainer_ends_is_left_alone() -> None:
    engine, stage = FakeEngine(*[PAUSED] * 60, RUNNING, *[PAUSED] * 60, RUNNING), Stage(end_s=400)

    await watch(engine, stage)

    assert engine.resumed == 0


async def test_an_engine_that_refuses_to_resume_is_a_problem_for_all_to_see() -> None:
    engine, stage = FakeEngine(PAUSED, obeys=False), Stage(end_s=190)

    await watch(engine, stage)

    assert stage.reports[-1][2] == "paused for 190 s, and it refuses to resume"
    assert engine.resumed > 1


async def test_an_engine_that_is_not_well_is_a_problem() -> None:
    stage = Stage(end_s=4)

    await watch(FakeEngine(RUNNING, SILENT, RUNNING), stage)

    assert [problem for _, _, problem in stage.reports] == ["", "its engine does not answer /health", ""]


# Looking at an engine


def answering(answers: dict[str, httpx.Response]) -> httpx.MockTransport:
    return httpx.MockTransport(lambda request: answers.get(request.url.path, httpx.Response(404)))


async def test_a_vllm_server_says_whether_it_is_paused_and_what_it_runs() -> None:
    answers = {
        "/health": httpx.Response(200),
        "/weight_info": httpx.Response(200, json={"weight_version": "7"}),
        "/is_paused": httpx.Response(200, json={"is_paused": True}),
    }
    async with EngineWindow(URL, "vllm", transport=answering(answers)) as window:
        look = await window.look()

    assert look == Look(is_healthy=True, is_paused=True, weight_version="7")
    assert look.policy_version == 7


async def test_an_sglang_server_does_not_say_whether_it_is_paused() -> None:
    answers = {"/health": httpx.Response(200), "/model_info": httpx.Response(200, json={"weight_version": "default"})}
    async with EngineWindow(URL, "sglang", transport=answering(answers)) as window:
        look = await window.look()

    assert look == Look(is_healthy=True, weight_version="default")
    assert look.policy_version is None


async def test_an_engine_that_answers_badly_or_not_at_all_is_not_well() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    for transport in (answering({"/health": httpx.Response(503)}), httpx.MockTransport(refuse)):
        async with EngineWindow(URL, "vllm", transport=transport) as window:
            assert await window.look() == SILENT
            assert not await window.resume()


async def test_a_server_without_rl_routes_is_well_and_runs_no_version() -> None:
    async with EngineWindow(URL, "vllm", transport=answering({"/health": httpx.Response(200)})) as window:
        assert await window.look() == Look(is_healthy=True)
        assert not await window.resume()


# The entry in the registry


class FakeRegistry:
    """FAKE of the rollout server's list."""

    def __init__(self) -> None:
        self.entries: dict[str, InferenceServer] = {}
        self.fault: Callable[[], Awaitable[None]] | None = None

    async def servers(self) -> list[InferenceServerStatus]:
        if self.fault:
            await self.fault()
        return [InferenceServerStatus(server=server, last_seen_s=1.0) for server in self.entries.values()]

    async def register_server(self, server: InferenceServer) -> None:
        self.entries[server.url] = server

    async def remove_server(self, url: str) -> None:
        if self.fault:
            await self.fault()
        self.entries.pop(url, None)


def test_what_the_trainer_has_against_a_server_is_kept_and_an_own_problem_ends_with_its_cause() -> None:
    assert joined_problem("quarantined", "") == "quarantined"
    assert joined_problem("quarantined", "dead") == "engine: dead"
    assert joined_problem("engine: dead", "") == ""


async def test_an_own_problem_ends_even_when_another_process_wrote_it() -> None:
    registry = FakeRegistry()
    await Registration(registry, url=URL, role="policy", model_name="smol").report(None, "dead")

    await Registration(registry, url=URL, role="policy", model_name="smol").report(4, "")

    assert registry.entries[URL].problem == ""


async def test_an_entry_follows_the_server_and_goes_with_it() -> None:
    registry = FakeRegistry()
    registration = Registration(registry, url=URL, role="policy", model_name="smol")

    await registration.report(None, "")
    assert registry.entries[URL] == InferenceServer(url=URL, model_name="smol")
    await registration.report(None, "dead")
    assert registry.entries[URL].problem == "engine: dead"
    await registration.report(4, "")
    assert registry.entries[URL] == InferenceServer(url=URL, model_name="smol", policy_version=4)
    await registration.leave()
    assert registry.entries == {}


async def test_a_rollout_server_that_is_away_ends_nothing_and_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    registry = FakeRegistry()
    registration = Registration(registry, url=URL, role="policy", model_name="smol")

    async def away() -> None:
        error: AtroposError = ServerUnreachableError("connection refused")
        raise error

    registry.fault = away
    for _ in range(3):
        await registration.report(1, "")
    await registration.leave()
    registry.fault = None
    await registration.report(1, "")

    assert [record.message.split(": ")[0] for record in caplog.records] == [
        "the rollout server does not take reports, trying on",
        f"could not take {URL} off the rollout server's list",
        "the rollout server takes reports again",
    ]
