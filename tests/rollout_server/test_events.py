"""The event log and its stream over a real socket."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.requests import Request

from atroposlib.client import RolloutClient
from atroposlib.errors import AtroposError, ServerUnreachableError
from atroposlib.wire.models import Event
from rollout_server.event_log import EventLog, TooManyWatchersError
from rollout_server.routes import watch
from tests.processes import free_port

ONE_WATCHER = 1


@dataclass(frozen=True)
class Watched:
    """The watch routes alone on a socket: what the log says is what clients see."""

    log: EventLog
    url: str


@dataclass(frozen=True)
class FakeServices:
    events: EventLog


async def answer_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, AtroposError)
    return JSONResponse({"code": error.code, "detail": str(error)}, status_code=error.status)


@pytest.fixture
async def watched() -> AsyncIterator[Watched]:
    app = FastAPI()
    app.include_router(watch.router)
    app.add_exception_handler(AtroposError, answer_error)
    log = EventLog(capacity=5, max_watchers=ONE_WATCHER)
    app.state.services = FakeServices(log)
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", lifespan="off"))
    serving = asyncio.create_task(server.serve())
    async with asyncio.timeout(10):
        while not server.started:  # noqa: ASYNC110 (uvicorn offers no event)
            await asyncio.sleep(0.01)
    yield Watched(log, f"http://127.0.0.1:{port}")
    log.close()
    server.should_exit = True
    async with asyncio.timeout(10):
        await serving


async def take(client: RolloutClient, count: int, *, after: int = 0) -> list[Event]:
    taken: list[Event] = []
    async with asyncio.timeout(10), aclosing(client.events(after=after)) as events:
        async for event in events:
            taken.append(event)
            if len(taken) == count:
                break
    return taken


async def test_a_watcher_gets_what_was_and_then_what_comes(watched: Watched) -> None:
    watched.log.append("run_opened", "run demo")

    async with RolloutClient(watched.url, deadline_s=5) as client:
        taking = asyncio.create_task(take(client, 2))
        await asyncio.sleep(0.2)
        threading.Thread(target=watched.log.append, args=("batch_formed", "step 0\nof 10")).start()
        events = await taking

    assert [(event.kind, event.text) for event in events] == [
        ("run_opened", "run demo"),
        ("batch_formed", "step 0\nof 10"),
    ]
    assert events[0].id < events[1].id


async def test_a_watcher_that_comes_back_goes_on_where_it_was(watched: Watched) -> None:
    for number in range(3):
        watched.log.append("committed", f"step {number}")
    second = watched.log.after(0)[1].id

    async with httpx.AsyncClient(base_url=watched.url) as http:
        by_header = await http.get("/v1/events?follow=false", headers={"Last-Event-ID": str(second)})
    async with RolloutClient(watched.url) as client:
        by_parameter = [event.text async for event in client.events(after=second, follow=False)]

    assert by_parameter == ["step 2"]
    assert "step 2" in by_header.text
    assert "step 1" not in by_header.text


async def test_the_stream_is_made_of_server_sent_events(watched: Watched) -> None:
    watched.log.append("committed", "step 4")

    async with httpx.AsyncClient(base_url=watched.url) as http:
        answer = await http.get("/v1/events?follow=false")

    (event,) = watched.log.after(0)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text == f"id: {event.id}\nevent: committed\ndata: {event.model_dump_json()}\n\n"


async def test_only_the_last_events_are_remembered(watched: Watched) -> None:
    for number in range(9):
        watched.log.append("committed", f"step {number}")

    assert [event.text for event in watched.log.after(0)] == [f"step {number}" for number in range(4, 9)]


async def test_an_id_of_another_life_of_the_server_gives_everything(watched: Watched) -> None:
    watched.log.append("committed", "step 1")
    last = watched.log.after(0)[-1].id

    assert watched.log.after(last) == []
    assert len(watched.log.after(last + 1000)) == 1


async def test_watchers_beyond_the_limit_are_told_to_poll_and_a_place_comes_free(watched: Watched) -> None:
    async with httpx.AsyncClient(base_url=watched.url, timeout=5) as http:
        async with http.stream("GET", "/v1/events") as stream:
            assert stream.status_code == 200
            refused = await http.get("/v1/events")
            polled = await http.get("/v1/events?follow=false")
        async with RolloutClient(watched.url, deadline_s=5) as client:  # tries again while it is told 429
            watched.log.append("committed", "step 1")
            (event,) = await take(client, 1)

    assert refused.status_code == 429
    assert "1 streams of events are open" in refused.json()["detail"]
    assert polled.status_code == 200
    assert event.text == "step 1"


async def test_closing_the_log_ends_every_stream(watched: Watched) -> None:
    async with httpx.AsyncClient(base_url=watched.url, timeout=5) as http, http.stream("GET", "/v1/events") as stream:
        watched.log.close()
        async with asyncio.timeout(5):
            rest = await stream.aread()

    assert rest == b"retry: 2000\n\n"


async def test_silence_is_broken_by_keep_alives() -> None:
    log = EventLog()
    async with asyncio.timeout(5), aclosing(log.follow(0, keep_alive_s=0.01)) as news:
        assert [await anext(news), await anext(news)] == [[], []]


async def test_a_place_is_given_back_when_its_watcher_fails() -> None:
    log = EventLog(max_watchers=ONE_WATCHER)
    with pytest.raises(ZeroDivisionError), log.watching():
        raise ZeroDivisionError
    with log.watching(), pytest.raises(TooManyWatchersError, match="follow=false"), log.watching():
        raise AssertionError("a second watcher got a place")


async def test_a_watcher_of_a_server_that_is_gone_hears_so_within_its_deadline() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    async with RolloutClient(url, deadline_s=0.2) as client:
        with pytest.raises(ServerUnreachableError, match=url):
            await take(client, 1)
