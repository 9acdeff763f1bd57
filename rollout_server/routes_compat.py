"""The Atropos HTTP routes at the root, for existing environments and trainers.

An old trainer has no step and no acknowledgement: asking for the next batch acknowledges the one before, and a batch
that was handed out just before a connection broke is offered again to a trainer that registers anew.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from atroposlib.errors import NoRunError
from atroposlib.wire.columns import decode_groups, encode_group, read_blobs
from atroposlib.wire.json_codec import ScoredData, group_from_json, group_to_json
from atroposlib.wire.models import EnvRequest, RunInfo, RunRequest
from rollout_server.config import ServerConfig
from rollout_server.limits import read_body
from rollout_server.routes_v1 import Inject
from rollout_server.stores.base import Batch

router = APIRouter(tags=["atropos"])


class Registration(msgspec.Struct, kw_only=True):
    """What an old trainer sends."""

    batch_size: int
    max_token_len: int
    checkpoint_dir: str
    save_checkpoint_interval: int
    starting_step: int
    num_steps: int
    wandb_group: str | None = None
    wandb_project: str | None = None


class RegisterEnv(msgspec.Struct, kw_only=True):
    """What an old environment sends."""

    max_token_length: int
    group_size: int
    desired_name: str | None = None
    weight: float | None = None
    min_batch_allocation: float | None = None


class EnvIdentifier(msgspec.Struct, kw_only=True):
    """Which environment asks."""

    env_id: int


@router.get("/")
async def root() -> dict[str, str]:
    """Liveness, as old clients know it."""
    return {"message": "AtroposLib API"}


@router.post("/register")
async def register(request: Request, services: Inject) -> dict[str, int]:
    """An old trainer registers. While a run is open it joins it; otherwise a new run starts."""
    body = await _json(request, Registration, services.config)
    current = await _run_or_none(services)
    run = RunRequest(
        run_name=current.run_name if current is not None else f"atropos-{uuid.uuid4().hex[:12]}",
        batch_size=body.batch_size,
        max_token_len=max(body.max_token_len, -1),
        num_steps=max(body.num_steps, 1),
        checkpoint_dir=body.checkpoint_dir,
        save_checkpoint_interval=body.save_checkpoint_interval,
        wandb_project=body.wandb_project,
        wandb_group=body.wandb_group,
    )
    await services.store.open_run(run)
    return {"uuid": uuid.uuid4().int}


@router.get("/batch")
async def batch(services: Inject) -> Response:
    """The next batch, or null. Asking for it acknowledges the batch handed out before."""
    run = await _run_or_none(services)
    if run is None:
        return JSONResponse(
            {"status": "error", "message": "Trainer not registered. Call /register first.", "batch": []}
        )
    handed_out = services.legacy.handed_out
    if handed_out is not None and handed_out == (run.session, run.acknowledged_step):
        await services.store.ack(run.acknowledged_step, run.session, None)
        await services.store.commit(run.acknowledged_step + 1, run.session)
        run = await services.store.run_info()
    if run.acknowledged_step >= run.request.num_steps:
        return JSONResponse({"batch": None})
    outcome = await services.store.lease(run.acknowledged_step, run.session)
    if not isinstance(outcome, Batch):
        return JSONResponse({"batch": None})
    services.legacy.handed_out = (run.session, run.acknowledged_step)
    groups = [group_to_json(decode_groups(blob)[0]) for blob in outcome.blobs]
    return Response(msgspec.json.encode({"batch": groups}), media_type="application/json")


@router.post("/register-env")
async def register_env(request: Request, services: Inject) -> dict[str, Any]:
    """An old environment joins; it waits while there is no trainer."""
    body = await _json(request, RegisterEnv, services.config)
    run = await _run_or_none(services)
    if run is None:
        return {"status": "wait for trainer to start"}
    name = body.desired_name or "env"
    taken = sum(env.name.rpartition("_")[0] == name for env in (await services.store.status()).envs)
    info = await services.store.register_env(
        EnvRequest(
            name=f"{name}_{taken}",
            group_size=body.group_size,
            max_token_len=body.max_token_length,
            weight=max(body.weight or 1.0, 0.01),
        )
    )
    return {
        "status": "success",
        "env_id": info.env_id,
        "wandb_name": f"{name}_{taken}",
        "checkpoint_dir": run.request.checkpoint_dir,
        "starting_step": run.acknowledged_step,
        "checkpoint_interval": run.request.save_checkpoint_interval,
        "num_steps": run.request.num_steps,
    }


@router.post("/scored_data")
async def scored_data(request: Request, services: Inject) -> dict[str, Any]:
    """One group."""
    await _append(services, [await _json(request, ScoredData, services.config)])
    return {"status": "received"}


@router.post("/scored_data_list")
async def scored_data_list(request: Request, services: Inject) -> dict[str, Any]:
    """Several groups."""
    groups = await _json(request, list[ScoredData], services.config)
    await _append(services, groups)
    return {"status": "received", "groups_processed": len(groups)}


@router.get("/wandb_info")
async def wandb_info(services: Inject) -> dict[str, str | None]:
    """Where the run logs."""
    run = await _run_or_none(services)
    return {
        "group": run.request.wandb_group if run else None,
        "project": run.request.wandb_project if run else None,
    }


@router.get("/info")
async def info(services: Inject) -> dict[str, int]:
    """Batch size and length limit; -1 before a trainer registered."""
    run = await _run_or_none(services)
    return {
        "batch_size": run.request.batch_size if run else -1,
        "max_token_len": run.request.max_token_len if run else -1,
    }


@router.get("/status")
async def status(services: Inject) -> dict[str, int]:
    """Steps and queued groups."""
    now = await services.store.status()
    return {"current_step": now.step, "queue_size": now.queued_groups}


@router.get("/status-env")
@router.post("/status-env")
async def status_env(request: Request, services: Inject) -> dict[str, float]:
    """What an old environment's scheduler asks ten times a second. Zeros for an environment that is not known."""
    query = request.query_params.get("env_id")
    env_id = int(query) if query is not None else (await _json(request, EnvIdentifier, services.config)).env_id
    now = await services.store.status()
    known = any(env.env_id == env_id for env in now.envs)
    return {
        "current_step": now.step if known else 0,
        "queue_size": now.queued_groups if known else 0,
        "unallocated_fraction": 1.0 if known else 0.0,
        "self_queue_size": now.queued_groups if known else 0,
        "max_group_size": 1,
        "env_weight": 1.0 if known else 0.0,
    }


@router.post("/disconnect-env")
async def disconnect_env(request: Request, services: Inject) -> dict[str, str]:
    """An old environment says goodbye; its queued groups stay."""
    body = await _json(request, EnvIdentifier, services.config)
    if any(env.env_id == body.env_id for env in (await services.store.status()).envs):
        return {"status": "success"}
    return {"status": "failure", "error": f"environment {body.env_id} is not registered"}


async def _run_or_none(services: Inject) -> RunInfo | None:
    try:
        return await services.store.run_info()
    except NoRunError:
        return None


async def _append(services: Inject, groups: Sequence[ScoredData]) -> None:
    encoded = [encode_group(group_from_json(group, group_id=uuid.uuid4().hex)) for group in groups]
    if encoded:
        await services.store.append(list(read_blobs(b"".join(encoded))))


async def _json(request: Request, kind: Any, config: ServerConfig) -> Any:
    """The body as `kind`, whatever the content type says; old clients are lax."""
    body = await read_body(request, config)
    try:
        return msgspec.convert(msgspec.json.decode(body), kind, strict=False)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise RequestValidationError(
            [{"type": "value_error", "loc": ("body",), "msg": str(error), "input": None}]
        ) from error


def jsonable_errors(error: RequestValidationError) -> list[Mapping[str, Any]]:
    """The `detail` list of a 422 answer."""
    return [
        {
            "type": item["type"],
            "loc": list(item["loc"]),
            "msg": item["msg"],
            "input": str(item.get("input"))[:200],
        }
        for item in error.errors()
    ]
