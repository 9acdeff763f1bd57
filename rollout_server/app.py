"""The FastAPI application: routes, what surrounds them, and the tasks that live as long as the server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from atroposlib import __version__
from atroposlib.errors import AtroposError, ConfigError
from rollout_server.config import ServerConfig
from rollout_server.http.answers import answer_error, answer_http_error, answer_validation
from rollout_server.http.auth import Gate, RouteTable
from rollout_server.http.drain import Drain
from rollout_server.http.limits import InflightBytes
from rollout_server.http.middleware import GateMiddleware, RequestMiddleware
from rollout_server.http.openapi import OldErrorBody, describe_security, error_responses
from rollout_server.metrics import Metrics
from rollout_server.routes import compat, operations, v1, watch
from rollout_server.services import Services
from rollout_server.signals import Signal
from rollout_server.stores import open_store
from rollout_server.stores.base import Store

log = logging.getLogger(__name__)

EXPIRY_PERIOD_S = 1.0

StoreOpener = Callable[[ServerConfig], Awaitable[Store]]


def create_app(config: ServerConfig, *, open_store: StoreOpener = open_store) -> FastAPI:
    """The application of one rollout server.

    Args:
        open_store: gives the store when the application starts; by default the one that the configuration names.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        store = await _open_store(config, open_store)
        services = Services(config=config, store=store, capacity=Signal(), queue=Signal())
        store.on_capacity, store.on_queue = services.capacity.fire, services.queue.fire
        store.on_event = services.events.append
        app.state.services = services
        app.state.drain.wake = lambda: _end_waiting(services)
        try:
            async with asyncio.TaskGroup() as tasks:
                expiry = tasks.create_task(_expire_forever(services))
                yield
                expiry.cancel()
        finally:
            await store.close()

    app = FastAPI(
        title="AtroposLib API",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        strict_content_type=False,  # JsonRoute decides
    )
    app.state.config, app.state.drain = config, Drain()
    # In the order in which requests look for theirs: the busiest first.
    for router in (v1.router, watch.router):
        app.include_router(router, responses=error_responses())
    app.include_router(compat.router, responses=error_responses(OldErrorBody))
    app.include_router(operations.router)
    app.add_exception_handler(AtroposError, answer_error)
    app.add_exception_handler(HTTPException, answer_http_error)
    app.add_exception_handler(RequestValidationError, answer_validation)
    _surround(app, config)
    return app


async def _open_store(config: ServerConfig, open_store: StoreOpener) -> Store:
    try:
        return await open_store(config)
    except OSError as error:
        raise ConfigError(f"data_dir={config.data_dir} cannot be used: {error}") from error


def _surround(app: FastAPI, config: ServerConfig) -> None:
    """Add the middleware; what is added last sees a request first."""
    table, inflight = RouteTable(), InflightBytes(config.max_inflight_bytes)
    app.state.metrics = Metrics(inflight)
    describe_security(app, table)
    app.add_middleware(GateMiddleware, table=table, gate=Gate(config))
    if config.cors_origins:  # outside the gate: a preflight carries no token
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "Content-Encoding"],
        )
    app.add_middleware(RequestMiddleware, table=table, metrics=app.state.metrics, inflight=inflight)


def _end_waiting(services: Services) -> None:
    services.capacity.fire()
    services.queue.fire()
    services.events.close()


async def _expire_forever(services: Services) -> None:
    while True:
        await asyncio.sleep(EXPIRY_PERIOD_S)
        try:
            expired = await services.store.expire_tickets()
        except Exception:  # a full disk may have room again; /readyz says what fails
            log.exception("expired tickets could not be looked for")
            continue
        if expired:
            log.warning("%d groups in flight were given up: their tickets were not renewed", expired)
