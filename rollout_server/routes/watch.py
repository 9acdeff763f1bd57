"""Routes for people who watch a run: events as they happen, and a diagnosis. They only read."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import nullcontext
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.responses import StreamingResponse

from atroposlib.wire.models import Diagnosis, Event
from rollout_server.diagnosis import Thresholds, diagnose
from rollout_server.event_log import EventLog
from rollout_server.services import Services

EVENTS_MEDIA_TYPE = "text/event-stream"
RETRY_MS = 2000
"""What a browser waits before it connects again."""

router = APIRouter(prefix="/v1", tags=["watch"])


def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


Inject = Annotated[Services, Depends(_services)]


Follow = Annotated[bool, Query(description="false: end after the events that are there.")]


async def _watched_log(services: Inject, follow: Follow = True) -> AsyncIterator[EventLog]:
    """The event log; who follows it holds a place among its watchers for as long as the answer is being sent."""
    with services.events.watching() if follow else nullcontext():
        yield services.events


@router.get(
    "/events",
    response_class=StreamingResponse,
    responses={
        200: {"content": {EVENTS_MEDIA_TYPE: {"schema": {"type": "string"}}}, "description": "server-sent events"},
        429: {"description": "too many streams are open"},
    },
)
async def events(
    log: Annotated[EventLog, Depends(_watched_log)],
    after: Annotated[int, Query(ge=0, description="Only events behind this id.")] = 0,
    follow: Follow = True,
    last_event_id: Annotated[str | None, Header(description="As after; sent by browsers that reconnect.")] = None,
) -> StreamingResponse:
    """What happens, as server-sent events: run opened, batch formed, policy published, groups retired, ..."""
    if last_event_id is not None and last_event_id.isdecimal():
        after = int(last_event_id)
    stream = _stream(log, after) if follow else _backlog(log, after)
    return StreamingResponse(stream, media_type=EVENTS_MEDIA_TYPE, headers={"Cache-Control": "no-store"})


@router.get("/doctor")
async def doctor(services: Inject) -> Diagnosis:
    """What is wrong with the run or will be, each with its fix; the same as `atropos doctor` prints."""
    config = services.config
    thresholds = Thresholds(
        trainer_timeout_s=config.trainer_timeout_s,
        env_timeout_s=config.env_timeout_s,
        max_queued_bytes=config.max_queued_bytes,
    )
    return Diagnosis(findings=diagnose(await services.store.status(), thresholds))


async def _stream(log: EventLog, after: int) -> AsyncIterator[str]:
    yield f"retry: {RETRY_MS}\n\n"
    async for news in log.follow(after):
        yield "".join(map(_as_text, news)) or ": alive\n\n"


async def _backlog(log: EventLog, after: int) -> AsyncIterator[str]:
    yield "".join(map(_as_text, log.after(after)))


def _as_text(event: Event) -> str:
    return f"id: {event.id}\nevent: {event.kind}\ndata: {event.model_dump_json()}\n\n"
