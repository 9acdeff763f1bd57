"""The native API under /v1: columns for groups, small JSON messages for everything else.

Routes are looked for in the order in which they stand here: the busiest first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.responses import JSONResponse

from atroposlib.errors import ConfigError, GroupFormatError
from atroposlib.wire.columns import Blob, read_blobs
from atroposlib.wire.models import (
    AckRequest,
    CommitRequest,
    EnvInfo,
    EnvRequest,
    GroupRecords,
    GroupsResult,
    InferenceServer,
    InferenceServerLeave,
    InferenceServerStatus,
    LeaseRequest,
    LeaseWait,
    NackRequest,
    NackResult,
    PolicyUpdate,
    RunInfo,
    RunRequest,
    Status,
    TicketGrant,
    TicketRequest,
    TicketUpdate,
    TicketUpdateResult,
    TrainerRenewal,
)
from rollout_server.config import ServerConfig
from rollout_server.group_limits import GROUPS_MEDIA_TYPE, GROUPS_REQUEST_BODY, check_groups, read_groups_body
from rollout_server.group_sizes import can_fill, divisors_near
from rollout_server.http.chunks_response import ChunksResponse
from rollout_server.http.strict_json import JsonRoute
from rollout_server.services import Services
from rollout_server.signals import poll_until
from rollout_server.stores.base import Batch, Shard

IN_LOOP_BYTES = 8 << 20
"""Bodies up to this size are checked on the event loop; larger ones on a thread, so that nobody waits for them."""

router = APIRouter(prefix="/v1", tags=["v1"], route_class=JsonRoute)


async def services_of(request: Request) -> Services:
    """What the application holds: store, signals, config."""
    services: Services = request.app.state.services
    return services


Inject = Annotated[Services, Depends(services_of)]
Step = Annotated[int, Path(ge=0, lt=1 << 62)]


@router.post("/groups", response_model=GroupsResult, openapi_extra={"requestBody": GROUPS_REQUEST_BODY})
async def post_groups(request: Request, services: Inject) -> Response:
    """Deliver groups: safetensors blobs, one after another. An answer means durable."""
    body = await read_groups_body(request, services.config)
    is_small = len(body) <= IN_LOOP_BYTES
    blobs = _parse(body, services.config) if is_small else await asyncio.to_thread(_parse, body, services.config)
    if not blobs:
        raise GroupFormatError("empty body: send at least one group")
    result = GroupsResult(results=await services.store.append(blobs))
    return Response(result.model_dump_json(), media_type="application/json")  # valid already: not checked a second time


@router.post(
    "/batches/{step}/lease",
    responses={
        200: {"content": {GROUPS_MEDIA_TYPE: {}}},
        202: {"model": LeaseWait, "description": "no batch yet"},
    },
    response_class=Response,
)
async def lease(step: Step, body: LeaseRequest, services: Inject, request: Request) -> Response:
    """The batch of a step as blobs; the same step gives the same batch. 202 when none came within wait_s."""
    outcome = await poll_until(
        services.queue,
        lambda: services.store.lease(step, body.session, Shard(body.shard, body.n_shards)),
        lambda outcome: isinstance(outcome, Batch),
        wait_s=body.wait_s,
        is_gone=lambda: _is_over(request),
    )
    if isinstance(outcome, Batch):
        return ChunksResponse(outcome.chunks or outcome.blobs, GROUPS_MEDIA_TYPE)
    return JSONResponse(LeaseWait(waiting_for=outcome.waiting_for).model_dump(), status_code=202)


@router.post("/batches/{step}/ack", status_code=204)
async def ack(step: Step, body: AckRequest, services: Inject) -> None:
    """The optimizer step used the batch; the inference servers now run policy_version."""
    await services.store.ack(step, body.session, body.policy_version)


@router.post("/tickets")
async def request_tickets(body: TicketRequest, services: Inject, request: Request) -> TicketGrant:
    """Leave to start groups; waits up to wait_s for a free place."""
    return await poll_until(
        services.capacity,
        lambda: services.store.grant_tickets(body),
        lambda grant: bool(grant.tickets) or grant.is_finished,
        wait_s=body.wait_s,
        is_gone=lambda: _is_over(request),
    )


@router.post("/run")
async def open_run(body: RunRequest, services: Inject) -> RunInfo:
    """A trainer opens a run, or takes over the run of the same name."""
    return await services.store.open_run(body)


@router.get("/run")
async def run_info(services: Inject) -> RunInfo:
    """The open run."""
    return await services.store.run_info()


@router.post("/run/renew", status_code=204)
async def renew_trainer(body: TrainerRenewal, services: Inject) -> None:
    """The trainer lives, though its step takes long. Every other call of it says so too."""
    await services.store.renew_trainer(body.session)


@router.post("/envs")
async def register_env(body: EnvRequest, services: Inject) -> EnvInfo:
    """An environment joins, or rejoins after a restart."""
    _check_group_size(await services.store.status(), body)
    return await services.store.register_env(body)


@router.post("/tickets/renew")
async def renew_tickets(body: TicketUpdate, services: Inject) -> TicketUpdateResult:
    """Move the deadlines of groups that are alive."""
    return TicketUpdateResult(alive=await services.store.renew_tickets(body))


@router.post("/tickets/return")
async def return_tickets(body: TicketUpdate, services: Inject) -> TicketUpdateResult:
    """Give tickets back unused, with the reason."""
    return TicketUpdateResult(alive=await services.store.return_tickets(body))


@router.get("/groups")
async def list_groups(
    services: Inject,
    after: Annotated[int, Query(ge=0, lt=1 << 63)] = 0,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
) -> GroupRecords:
    """Where each group of the run is: queued, in the batch of a step, or retired and why. A page, in order of arrival."""
    return await services.store.records(after, limit)


@router.post("/batches/{step}/nack")
async def nack(step: Step, body: NackRequest, services: Inject) -> NackResult:
    """The trainer cannot use the batch: its groups go back to the queue, those it names are retired."""
    return await services.store.nack(step, body)


@router.post("/commit", status_code=204)
async def commit(body: CommitRequest, services: Inject) -> None:
    """A checkpoint holds the weights after `step` steps."""
    await services.store.commit(body.step, body.session)


@router.post("/policy", status_code=204)
async def publish_policy(body: PolicyUpdate, services: Inject) -> None:
    """The inference servers run this version."""
    await services.store.set_policy(body.policy_version, body.session)


@router.post("/servers", status_code=204)
async def register_server(body: InferenceServer, services: Inject) -> None:
    """An inference server joins the registry, or says again that it is there."""
    await services.store.register_server(body)


@router.post("/servers/leave", status_code=204)
async def remove_server(body: InferenceServerLeave, services: Inject) -> None:
    """An inference server goes; one that is not known is gone already."""
    await services.store.remove_server(body.url)


@router.get("/servers")
async def list_servers(services: Inject) -> list[InferenceServerStatus]:
    """The registry of inference servers."""
    return (await services.store.status()).inference_servers


@router.get("/status")
async def status(services: Inject) -> Status:
    """Counters of queue, tickets, environments and trainer."""
    return await services.store.status()


def _parse(body: bytes | memoryview, config: ServerConfig) -> Sequence[Blob]:
    blobs = list(read_blobs(body))
    check_groups(blobs, config)
    return blobs


async def _is_over(request: Request) -> bool:
    """Whether to answer a long-poll now: the caller hung up, or the server is going down."""
    return request.app.state.drain.is_draining or await request.is_disconnected()


def _check_group_size(status: Status, env: EnvRequest) -> None:
    """Refuse an environment whose groups no batch could hold: an error now is better than a trainer that waits for ever.

    Raises:
        ConfigError: no sum of its groups and those of the environments that are there is batch_size.
    """
    sizes = [env.group_size, *(other.group_size for other in status.envs if other.is_connected)]
    if status.batch_size and not can_fill(sizes, status.batch_size):
        raise ConfigError(
            f"group_size={env.group_size} of environment {env.name!r} does not divide batch_size={status.batch_size}, and no"
            f" environment is there to fill the rest; use one of {divisors_near(status.batch_size, env.group_size)}"
        )
