"""Calls to one inference server: each has a deadline, and fails as a ServerSyncError that names server and route."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
        self._lock = threading.Lock()
        self._in_flight = 0
        self._is_closed = False

    def close(self) -> None:
        """Begin no more calls, and drop the connections as soon as none is in flight.

        To drop them at once would leave one that is just being opened open for good, and let the thread that reads from
        another read on under a number that the kernel may have given to something else.
        """
        with self._lock:
            self._is_closed = True
            self._drop_if_unused()

    def request(self, method: str, path: str, edge: Edge, timeout_s: float, **request: Any) -> httpx.Response:
        """Return the answer, whatever its status.

        Raises:
            ServerSyncError: there was none within `timeout_s`, the URL is none, or close() was called.
        """
        try:
            with self._call(path, edge):
                # httpx's timeout is for each read and write; these answers are one small packet.
                return self._http.request(method, self.url + path, timeout=timeout_s, **request)
        except httpx.TimeoutException:
            raise ServerSyncError(self.url, edge, f"{path} did not answer within {timeout_s:.3g} s") from None
        except httpx.InvalidURL as error:
            raise ServerSyncError(self.url, edge, f"it is no URL: {error}; give http://HOST:PORT") from error
        except httpx.TransportError as error:
            raise ServerSyncError(self.url, edge, f"{path}: {type(error).__name__}: {error}") from error

    @contextmanager
    def _call(self, path: str, edge: Edge) -> Iterator[None]:
        with self._lock:
            if self._is_closed:
                raise ServerSyncError(self.url, edge, f"{path}: this control is closed")
            self._in_flight += 1
        try:
            yield
        finally:
            with self._lock:
                self._in_flight -= 1
                self._drop_if_unused()

    def _drop_if_unused(self) -> None:
        if self._is_closed and not self._in_flight:
            self._http.close()
