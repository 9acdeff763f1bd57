"""The Atropos HTTP routes at the root, for existing environments and trainers. docs/atropos-clients.md has their rules."""

from __future__ import annotations

import uuid
from collections.abc import Callable

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from atroposlib.errors import OverloadedError, QueueFullError
from atroposlib.wire.columns import decode_groups
from atroposlib.wire.json_codec import group_to_json_text
from rollout_server.compat import runs
from rollout_server.compat.answering import json_answer, work
from rollout_server.compat.dedupe import Deduplication
from rollout_server.compat.handover import BatchAnswer
from rollout_server.compat.intake import Intake, Reader, take_in
from rollout_server.compat.messages import UNLIMITED_STEPS, EnvIdentifier, RegisterEnv, Registration, parse, refusal
from rollout_server.compat.status_env import env_figures, env_status, queue_figures
from rollout_server.http.answers import RETRY_AFTER_S
from rollout_server.http.limits import read_body, read_payload
from rollout_server.routes.v1 import Inject
from rollout_server.stores.base import Payload

router = APIRouter(tags=["atropos"])

NO_EXAMPLE_KEYS = (
    "tokens", "masks", "scores", "advantages", "ref_logprobs", "generation_params", "inference_logprobs", "messages",
    "images",
)  # fmt: skip


@router.get("/")
async def root() -> dict[str, str]:
    """Liveness, as old clients know it."""
    return {"message": "AtroposLib API"}


@router.post("/register")
async def register(request: Request, services: Inject) -> dict[str, int]:
    """An old trainer registers: it goes on with the run that it had, or begins a new one."""
    body = await read_body(request, services.config)
    registration = parse(Registration.model_validate_json, body)
    await runs.register_trainer(services.store, services.legacy, registration)
    return {"uuid": uuid.uuid4().int}


@router.get("/batch", response_class=Response)
async def batch(request: Request, services: Inject) -> Response:
    """The next batch, or null. Asking for it acknowledges the batch received before."""
    return BatchAnswer(services, request)


@router.post("/register-env")
async def register_env(request: Request, services: Inject) -> dict[str, str | int]:
    """An old environment joins; it waits while there is no trainer."""
    message = parse(RegisterEnv.model_validate_json, await read_body(request, services.config))
    run = await runs.run_or_none(services.store)
    if run is None:
        return {"status": "wait for trainer to start"}
    env_id, name = await runs.register_env(services.store, services.legacy, message)
    num_steps = run.request.num_steps
    return {
        "status": "success",
        "env_id": env_id,
        "wandb_name": name,
        "checkpoint_dir": run.request.checkpoint_dir,
        "starting_step": (await services.store.status()).formed_steps,
        "checkpoint_interval": run.request.save_checkpoint_interval,
        "num_steps": -1 if num_steps == UNLIMITED_STEPS else num_steps,
    }


@router.post("/scored_data")
async def scored_data(request: Request, services: Inject) -> Response:
    """One group."""
    return await _take_in(request, services, lambda reader: reader.one, lambda n_groups: {"status": "received"})


@router.post("/scored_data_list")
async def scored_data_list(request: Request, services: Inject) -> Response:
    """Several groups."""
    return await _take_in(
        request,
        services,
        lambda reader: reader.many,
        lambda n_groups: {"status": "received", "groups_processed": n_groups},
    )


async def _take_in(
    request: Request,
    services: Inject,
    route: Callable[[Reader], Callable[[Payload], list[Intake]]],
    answer: Callable[[int], dict[str, str | int]],
) -> Response:
    sender = request.client.host if request.client is not None else ""
    reader = Reader(services.config, Deduplication(services.config.legacy_dedupe_window_s), sender)
    try:
        n_groups = await take_in(services, await read_payload(request, services.config), route(reader))
    except (QueueFullError, OverloadedError) as error:
        # Old environments throw a group away at any 4xx, and try again at 503.
        return JSONResponse({"detail": str(error)}, status_code=503, headers={"Retry-After": str(RETRY_AFTER_S)})
    return JSONResponse(answer(n_groups))


@router.get("/wandb_info")
async def wandb_info(services: Inject) -> dict[str, str | None]:
    """Where the run logs."""
    run = await runs.run_or_none(services.store)
    return {
        "group": run.request.wandb_group if run else None,
        "project": run.request.wandb_project if run else None,
    }


@router.get("/info")
async def info(services: Inject) -> dict[str, int]:
    """Batch size and length limit; -1 before a trainer registered."""
    run = await runs.run_or_none(services.store)
    return {
        "batch_size": run.request.batch_size if run else -1,
        "max_token_len": run.request.max_token_len if run else -1,
    }


@router.get("/latest_example")
async def latest_example(request: Request, services: Inject) -> Response:
    """The group that came last."""
    payload = await services.store.latest_group()
    if payload is None:
        return JSONResponse({key: [] for key in NO_EXAMPLE_KEYS})
    text = await work(len(payload), lambda: group_to_json_text(decode_groups(payload)[0]))
    return await json_answer(request, text)


@router.get("/status")
async def status(services: Inject) -> dict[str, int]:
    """Batches handed out, and queued groups."""
    now = await services.store.status()
    return {"current_step": now.formed_steps, "queue_size": now.queued_groups}


@router.get("/status-env")
@router.post("/status-env")
async def status_env(request: Request, services: Inject) -> dict[str, int | float]:
    """What an old environment's scheduler asks many times a second; asking shows that it lives."""
    env_id = await _env_id(request, services)
    await services.store.touch_env(env_id)
    now = await services.store.status()
    envs = env_figures(now.envs, services.legacy.largest_groups, env_timeout_s=services.config.env_timeout_s)
    return env_status(env_id, envs, queue_figures(now))


@router.post("/disconnect-env")
async def disconnect_env(request: Request, services: Inject) -> dict[str, str]:
    """An old environment says goodbye; its queued groups stay."""
    env_id = await _env_id(request, services)
    if await services.store.disconnect_env(env_id):
        return {"status": "success"}
    return {"status": "failure", "error": f"environment {env_id} is not registered"}


@router.get("/reset_data", response_class=PlainTextResponse)
@router.post("/reset_data", response_class=PlainTextResponse)
async def reset_data(services: Inject) -> PlainTextResponse:
    """Archive the run and start clean: the next trainer begins a new one."""
    await runs.reset(services.store, services.legacy)
    return PlainTextResponse("Reset successful")


async def _env_id(request: Request, services: Inject) -> int:
    """From the body, or from the query where proxies drop bodies of GET."""
    query = request.query_params.get("env_id")
    if query is None:
        return parse(EnvIdentifier.model_validate_json, await read_body(request, services.config)).env_id
    try:
        return int(query)
    except ValueError as error:
        raise refusal("int_parsing", ("query", "env_id"), "Input should be a valid integer", query) from error
