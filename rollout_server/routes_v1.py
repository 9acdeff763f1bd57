"""The native API under /v1: columns for groups, small JSON messages for everything else."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from atroposlib.errors import GroupFormatError, ProtocolError
from atroposlib.wire.columns import Blob, read_blobs
from atroposlib.wire.models import (
    AckRequest,
    CommitRequest,
    EnvInfo,
    EnvRequest,
    GroupRecord,
    GroupsResult,
    LeaseRequest,
    LeaseWait,
    PolicyUpdate,
    RunInfo,
    RunRequest,
    Status,
    TicketGrant,
    TicketRequest,
    TicketUpdate,
    TicketUpdateResult,
)
from rollout_server.services import Services
from rollout_server.signals import poll_until
from rollout_server.stores.base import Batch

GROUPS_MEDIA_TYPE = "application/vnd.atropos.groups"
IN_LOOP_BYTES = 1 << 20
"""Bodies up to this size are checked on the event loop; larger ones on a thread, so that nobody waits for them."""

router = APIRouter(prefix="/v1", tags=["v1"])


def services_of(request: Request) -> Services:
    """What the application holds: store, signals, config."""
    services: Services = request.app.state.services
    return services


Inject = Annotated[Services, Depends(services_of)]


@router.post("/run")
async def open_run(body: RunRequest, services: Inject) -> RunInfo:
    """A trainer opens a run, or takes over the run of the same name."""
    return await services.store.open_run(body)


@router.get("/run")
async def run_info(services: Inject) -> RunInfo:
    """The open run."""
    return await services.store.run_info()


@router.post("/envs")
async def register_env(body: EnvRequest, services: Inject) -> EnvInfo:
    """An environment joins, or rejoins after a restart."""
    return await services.store.register_env(body)


@router.post("/tickets")
async def request_tickets(body: TicketRequest, services: Inject, request: Request) -> TicketGrant:
    """Leave to start groups; waits up to wait_s for a free place."""
    return await poll_until(
        services.capacity,
        lambda: services.store.grant_tickets(body),
        lambda grant: bool(grant.tickets) or grant.is_finished,
        wait_s=body.wait_s,
        is_gone=request.is_disconnected,
    )


@router.post("/tickets/renew")
async def renew_tickets(body: TicketUpdate, services: Inject) -> TicketUpdateResult:
    """Move the deadlines of groups that are alive."""
    return TicketUpdateResult(alive=await services.store.renew_tickets(body))


@router.post("/tickets/return")
async def return_tickets(body: TicketUpdate, services: Inject) -> TicketUpdateResult:
    """Give tickets back unused, with the reason."""
    return TicketUpdateResult(alive=await services.store.return_tickets(body))


@router.post("/groups", openapi_extra={"requestBody": {"content": {GROUPS_MEDIA_TYPE: {}}, "required": True}})
async def post_groups(request: Request, services: Inject) -> GroupsResult:
    """Deliver groups: safetensors blobs, one after another. An answer means durable."""
    body = await read_body(request, services.config.max_body_bytes)
    blobs = _parse(body) if len(body) <= IN_LOOP_BYTES else await asyncio.to_thread(_parse, body)
    if not blobs:
        raise GroupFormatError("empty body: send at least one group")
    return GroupsResult(results=await services.store.append(blobs))


@router.get("/groups")
async def list_groups(services: Inject) -> list[GroupRecord]:
    """Where each group of the run is: queued, in the batch of a step, or retired and why."""
    return await services.store.records()


@router.post(
    "/batches/{step}/lease",
    responses={
        200: {"content": {GROUPS_MEDIA_TYPE: {}}},
        202: {"model": LeaseWait, "description": "no batch yet"},
    },
    response_class=Response,
)
async def lease(step: int, body: LeaseRequest, services: Inject, request: Request) -> Response:
    """The batch of a step as blobs; the same step gives the same batch. 202 when none came within wait_s."""
    outcome = await poll_until(
        services.queue,
        lambda: services.store.lease(step, body.session),
        lambda outcome: isinstance(outcome, Batch),
        wait_s=body.wait_s,
        is_gone=request.is_disconnected,
    )
    if isinstance(outcome, Batch):
        return Response(b"".join(outcome.blobs), media_type=GROUPS_MEDIA_TYPE)
    return JSONResponse(LeaseWait(waiting_for=outcome.waiting_for).model_dump(), status_code=202)


@router.post("/batches/{step}/ack", status_code=204)
async def ack(step: int, body: AckRequest, services: Inject) -> None:
    """The optimizer step used the batch; the inference servers now run policy_version."""
    await services.store.ack(step, body.session, body.policy_version)


@router.post("/commit", status_code=204)
async def commit(body: CommitRequest, services: Inject) -> None:
    """A checkpoint holds the weights after `step` steps."""
    await services.store.commit(body.step, body.session)


@router.post("/policy", status_code=204)
async def publish_policy(body: PolicyUpdate, services: Inject) -> None:
    """The inference servers run this version."""
    await services.store.set_policy(body.policy_version, body.session)


@router.get("/status")
async def status(services: Inject) -> Status:
    """Counters of queue, tickets, environments and trainer."""
    return await services.store.status()


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body, refused as soon as it passes the limit."""
    stated = request.headers.get("content-length", "")
    if stated.isdigit() and int(stated) > limit:
        raise BodyTooLargeError(f"body of {stated} bytes is over max_body_bytes={limit}; send fewer groups a request")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise BodyTooLargeError(f"body is over max_body_bytes={limit}; send fewer groups a request")
    return bytes(body)


class BodyTooLargeError(ProtocolError):
    """The request body is larger than the server takes."""

    code = "body_too_large"
    status = 413


def _parse(body: bytes) -> Sequence[Blob]:
    return list(read_blobs(body))
