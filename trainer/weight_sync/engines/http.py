"""Calls to one inference server: each has a deadline, and fails as a ServerSyncError that names server and route."""

from __future__ import annotations

from typing import Any

import httpx

from trainer.weight_sync.errors import ServerSyncError
from trainer.weight_sync.states import Edge

UNREADABLE = (KeyError, IndexError, TypeError, ValueError, AttributeError)
"""What reading an answer of another form than expected raises."""


class EngineHttp:
    """The HTTP side of a control. Safe to use from several threads.

    Args:
        url: of the server; a trailing `/v1` is dropped.
        transport: replaces the network in tests.
    """

    def __init__(self, url: str, *, transport: httpx.BaseTransport | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._http = httpx.Client(
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
            ServerSyncError: there was none within `timeout_s`, the URL is none, or close() was called.
        """
        try:
            # httpx's timeout is for each read and write; these answers are one small packet.
            return self._http.request(method, self.url + path, timeout=timeout_s, **request)
        except httpx.TimeoutException:
            raise ServerSyncError(self.url, edge, f"{path} did not answer within {timeout_s:.3g} s") from None
        except httpx.InvalidURL as error:
            raise ServerSyncError(self.url, edge, f"it is no URL: {error}; give http://HOST:PORT") from error
        except httpx.TransportError as error:
            raise ServerSyncError(self.url, edge, f"{path}: {type(error).__name__}: {error}") from error
        except RuntimeError as error:
            if not self._http.is_closed:
                raise
            raise ServerSyncError(self.url, edge, f"{path}: this control is closed") from error
