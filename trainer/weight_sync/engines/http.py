"""Calls to one inference server: each has a deadline, and fails as a ServerSyncError that names server and route."""

from __future__ import annotations

import time
from typing import Any

import httpx

from trainer.weight_sync.errors import ServerSyncError
from trainer.weight_sync.states import Edge


class EngineHttp:
    """The HTTP side of a control. Safe to use from several threads.

    Args:
        url: of the server; a trailing `/v1` is dropped.
        transport: replaces the network in tests.
    """

    def __init__(self, url: str, *, transport: httpx.BaseTransport | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._http = httpx.Client(
            base_url=self.url,
            transport=transport,
            # An engine that fails in a call may reset the connection, so none is used twice. A publication
            # makes a dozen calls; a connection for each costs nothing.
            limits=httpx.Limits(max_keepalive_connections=0),
            trust_env=False,
        )

    def close(self) -> None:
        """Drop the connections."""
        self._http.close()

    def request(self, method: str, path: str, edge: Edge, timeout_s: float, **request: Any) -> httpx.Response:
        """Return the answer, whatever its status.

        Raises:
            ServerSyncError: there was none within `timeout_s`.
        """
        try:
            # httpx's timeout is for each read and write; these answers are one small packet.
            return self._http.request(method, path, timeout=timeout_s, **request)
        except httpx.TimeoutException:
            raise ServerSyncError(self.url, edge, f"{path} did not answer within {timeout_s:.3g} s") from None
        except httpx.TransportError as error:
            raise ServerSyncError(self.url, edge, f"{path}: {type(error).__name__}: {error}") from error


def time_left(deadline: float) -> float:
    """The seconds until `deadline` on time.monotonic(), or a moment if it has passed: the call then fails by itself."""
    return max(deadline - time.monotonic(), 0.05)
