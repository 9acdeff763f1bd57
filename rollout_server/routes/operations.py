"""Routes for operators: is the process up, may it be sent work, what does it count."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from rollout_server.http.drain import Drain
from rollout_server.metrics import Metrics
from rollout_server.services import Services

STORE_TIMEOUT_S = 5.0
"""A store that takes longer to count itself is not ready."""

router = APIRouter(tags=["operations"])


class Health(BaseModel):
    """Whether all is well; why not, if not."""

    status: str
    reason: str | None = None


@router.get("/healthz")
async def healthz() -> Health:
    """The process is up and answers."""
    return Health(status="ok")


@router.get("/readyz", responses={503: {"model": Health, "description": "not now; the reason says why"}})
async def readyz(request: Request) -> Response:
    """Whether work may be sent here: the store answers and the server is not going down."""
    reason = await _unready_because(request.app.state.drain, request.app.state.services)
    health = Health(status="ok" if reason is None else "unavailable", reason=reason)
    return JSONResponse(health.model_dump(), status_code=200 if reason is None else 503)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Prometheus text exposition."""
    counts: Metrics = request.app.state.metrics
    services: Services = request.app.state.services
    return Response(counts.render(await services.store.status()), media_type=CONTENT_TYPE_LATEST)


async def _unready_because(drain: Drain, services: Services) -> str | None:
    if drain.is_draining:
        return "the server is shutting down"
    try:
        async with asyncio.timeout(STORE_TIMEOUT_S):
            await services.store.status()
    except TimeoutError:
        return f"the store did not answer within {STORE_TIMEOUT_S:g} s"
    except Exception as error:  # whatever it is, it is the reason
        return f"the store fails: {type(error).__name__}: {error}"
    return None
