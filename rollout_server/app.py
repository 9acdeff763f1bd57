"""The FastAPI application: routes, error answers, and the tasks that live as long as the server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from atroposlib import __version__
from atroposlib.errors import AtroposError
from atroposlib.wire.models import ErrorBody
from rollout_server import routes_compat, routes_v1
from rollout_server.config import ServerConfig
from rollout_server.services import Services
from rollout_server.signals import Signal
from rollout_server.stores.sqlite import SQLiteStore

log = logging.getLogger(__name__)

EXPIRY_PERIOD_S = 1.0


def create_app(config: ServerConfig) -> FastAPI:
    """The application of one rollout server on its embedded store."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        store = SQLiteStore(
            config.data_dir,
            synchronous=config.synchronous,
            ticket_ttl_s=config.ticket_ttl_s,
            max_queued_bytes=config.max_queued_bytes,
        )
        services = Services(config=config, store=store, capacity=Signal(), queue=Signal())
        store.on_capacity, store.on_queue = services.capacity.fire, services.queue.fire
        app.state.services = services
        async with asyncio.TaskGroup() as tasks:
            expiry = tasks.create_task(_expire_forever(services))
            yield
            expiry.cancel()
        await store.close()

    app = FastAPI(title="AtroposLib API", version=__version__, lifespan=lifespan)
    app.include_router(routes_compat.router)
    app.include_router(routes_v1.router)
    app.add_exception_handler(AtroposError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_validation)

    @app.get("/healthz", tags=["operations"])
    async def healthz() -> dict[str, str]:
        """The process is up and its store answers."""
        await app.state.services.store.status()
        return {"status": "ok"}

    return app


async def _expire_forever(services: Services) -> None:
    while True:
        await asyncio.sleep(EXPIRY_PERIOD_S)
        expired = await services.store.expire_tickets()
        if expired:
            log.warning("%d groups in flight were given up: their tickets were not renewed", expired)


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, AtroposError)
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse(
        ErrorBody(code=error.code, detail=str(error)).model_dump(), status_code=error.status, headers=headers
    )


async def _answer_validation(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    if not request.url.path.startswith("/v1/"):  # the old routes answer as FastAPI does
        return JSONResponse({"detail": routes_compat.jsonable_errors(error)}, status_code=422)
    detail = "; ".join(
        f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']} (got {str(item.get('input'))[:80]})"
        for item in error.errors()
    )
    return JSONResponse(ErrorBody(code="protocol", detail=detail).model_dump(), status_code=422)
