"""The listening socket and the uvicorn server, which drains before it ends."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from atroposlib.errors import ConfigError
from rollout_server.config import ServerConfig
from rollout_server.http.drain import Drain
from rollout_server.http.protocol import bounded_protocol

BACKLOG = 2048
CLOSE_TIMEOUT_S = 1
"""For connections to close after the drain; requests that still run are cancelled then."""
POLL_PERIOD_S = 0.05


def listen(config: ServerConfig) -> socket.socket:
    """Bind host and port.

    Raises:
        ConfigError: the address is taken, or is not one of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ConfigError(f"cannot listen on {config.host}:{config.port}: {error.strerror}") from error
    return listener


def make_server(app: FastAPI, config: ServerConfig) -> DrainingServer:
    """uvicorn around an application of create_app, with this server's limits; run it on sockets from listen."""
    settings = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        loop="uvloop",
        http=bounded_protocol(config),
        ws="none",
        backlog=BACKLOG,
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile=config.ssl_keyfile,
        lifespan="off",  # DrainingServer's, so that an error at start keeps its type
        timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
    )
    return DrainingServer(settings, app, config)


class DrainingServer(uvicorn.Server):
    """Goes down in three steps: /readyz says 503; requests under way finish; connections close.

    Args:
        settings: of uvicorn.
        app: of create_app; its lifespan is entered before the first request and left after the last.
        config: how long each step may take.
    """

    def __init__(self, settings: uvicorn.Config, app: FastAPI, config: ServerConfig) -> None:
        super().__init__(settings)
        self._app = app
        self._drain: Drain = app.state.drain
        self._server_config = config

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer requests until told to end. Raises what the application raises while it starts."""
        async with self._app.router.lifespan_context(self._app):
            await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains; the second one ends the process on the spot, which the store survives."""
        if self.should_exit:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then close as uvicorn does."""
        self._drain.begin()
        await self._answer_on()
        await super().shutdown(sockets)

    async def _answer_on(self) -> None:
        leaves_from = time.monotonic() + self._server_config.drain_delay_s
        must_leave = leaves_from + self._server_config.drain_timeout_s
        while (now := time.monotonic()) < leaves_from or (self.server_state.tasks and now < must_leave):
            await asyncio.sleep(POLL_PERIOD_S)
            self._drain.wake()  # a long-poll may have come meanwhile
