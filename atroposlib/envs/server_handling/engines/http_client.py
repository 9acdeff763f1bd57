"""HTTP to an inference server: one aiohttp session each, its answers and failures turned into ours.

aiohttp, because httpx 0.28 spends more on its pool than on the requests once some 1,500 of them are in flight.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import sys
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

from atroposlib.errors import AtroposError, ConfigError, ModelServerError, RolloutError

if TYPE_CHECKING:
    import aiohttp

# Thousands of connections at once to a busy machine take their time; a dead process refuses at once anyway.
CONNECT_TIMEOUT_S = 30.0
# vLLM and SGLang run under uvicorn, which closes a connection after 5 idle seconds: let it go before that.
KEEP_ALIVE_S = 4.0
RETRIED_STATUSES = frozenset({408, 425, 429})
"""Statuses below 500 that say "not now" rather than "not so"."""


@dataclass(frozen=True)
class HttpAnswer:
    """A status and a whole body."""

    status: int
    body: bytes

    @property
    def text(self) -> str:
        """The body's first characters, for error messages."""
        return self.body[:500].decode("utf-8", errors="replace")


class EngineHttp:
    """The connections to one server. How many there are is up to the semaphores above: nothing queues here.

    Args:
        server: how errors name the server.
        api_key: sent as a bearer token unless empty.
        timeout_s: what a whole request may take.
    """

    def __init__(self, server: str, *, api_key: str | None, timeout_s: float) -> None:
        self.server = server
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def close(self) -> None:
        """Close the connections; a later request opens new ones."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def get(self, url: str, *, timeout_s: float) -> HttpAnswer:
        """GET, whatever the status.

        Raises:
            ModelServerError: no answer came.
        """
        return await self._request("GET", url, timeout_s=timeout_s)

    async def post(
        self,
        url: str,
        body: Any,
        *,
        timeout_s: float | None = None,
        headers: Mapping[str, str] | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> HttpAnswer:
        """POST a JSON body; any status is an answer.

        Raises:
            ModelServerError: no answer came.
            ConfigError: this process may not open another connection.
        """
        return await self._request(
            "POST",
            url,
            timeout_s=timeout_s or self._timeout_s,
            data=msgspec.json.encode(body, enc_hook=_plain),
            headers={"Content-Type": "application/json", **(headers or {})},
            params=params,
        )

    def read(self, answer: HttpAnswer, route: str, *, fix: str = "") -> Any:
        """The JSON of a successful answer.

        Args:
            fix: what to change where the server does not know the route or the model, or lets nobody in.
        Raises:
            ModelServerError: the server failed, or is too busy; another try may succeed.
            ConfigError: the route, the model or the key is wrong.
            RolloutError: this request was refused.
        """
        if answer.status == 200:
            try:
                return msgspec.json.decode(answer.body)
            except msgspec.DecodeError as error:
                raise ModelServerError(
                    f"{self.server}: unreadable answer of {route}: {error}: {answer.text}"
                ) from error
        what = f"{self.server}: {route} answered {answer.status}: {answer.text}"
        if answer.status in (401, 403, 404, 405):
            raise ConfigError(f"{what}; {fix}" if fix else what)
        if 400 <= answer.status < 500 and answer.status not in RETRIED_STATUSES:
            raise RolloutError(f"{self.server} refused the request: {route} answered {answer.status}: {answer.text}")
        raise ModelServerError(what)

    async def _request(self, method: str, url: str, *, timeout_s: float, **options: Any) -> HttpAnswer:
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        try:
            session = await self._open_session(url)
            async with session.request(method, url, timeout=timeout, **options) as response:
                return HttpAnswer(response.status, await response.read())
        except (aiohttp.ClientError, OSError) as error:
            if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
                raise ConfigError(
                    f"no connection to {self.server}: {error}; raise the limit of open files (ulimit -n), "
                    "or lower openai.num_max_requests_at_once (judges: rim.max_concurrent_judge_calls)"
                ) from error
            raise ModelServerError(
                f"{self.server}: {method} {urlsplit(url).path}: {type(error).__name__}: {error}"
                + (f" (limit {timeout_s} s)" if isinstance(error, TimeoutError) else "")
            ) from error

    async def _open_session(self, url: str) -> aiohttp.ClientSession:
        import aiohttp

        loop = asyncio.get_running_loop()
        if self._session is not None and self._loop is not loop:
            # Its event loop is over, and its connections with it.
            await self.close()
        if self._session is None:
            self._loop = loop
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=self._headers,
                proxy=proxy_for(url),
            )
        return self._session


def proxy_for(url: str) -> str | None:
    """The HTTP proxy that the environment variables (HTTPS_PROXY, NO_PROXY, ...) ask for, as other tools read them."""
    parts = urlsplit(url)
    if parts.hostname is None or urllib.request.proxy_bypass(parts.hostname):
        return None
    return urllib.request.getproxies().get(parts.scheme)


def is_infrastructure_failure(error: Exception) -> bool:
    """Whether a client library's error means that the server failed, rather than that the request was wrong."""
    if isinstance(error, AtroposError):
        return False
    if isinstance(error, ConnectionError | TimeoutError | socket.gaierror):
        return True
    answer = getattr(error, "response", None)
    status = getattr(error, "status_code", getattr(error, "status", getattr(answer, "status_code", None)))
    if isinstance(status, int):
        return status >= 500 or status in RETRIED_STATUSES
    return isinstance(error, _transport_errors())


def _transport_errors() -> tuple[type[Exception], ...]:
    """Of the libraries that are loaded: one that is not cannot have raised anything."""
    names = {
        "aiohttp": ("ClientError",),
        "httpx": ("TransportError",),
        "httpx2": ("TransportError",),
        "openai": ("APIConnectionError",),
        "requests": ("ConnectionError", "Timeout"),
        "urllib.error": ("URLError",),
    }
    return tuple(
        getattr(sys.modules[module], name)
        for module, classes in names.items()
        if module in sys.modules
        for name in classes
    )


def _plain(value: Any) -> Any:
    """What authors put into messages and parameters: pydantic models, numpy numbers and arrays, any iterable."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json", exclude_unset=True)
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "__iter__"):
        return list(value)
    raise TypeError(f"a request cannot carry a {type(value).__name__}: {value!r}")
