"""FAKES of inference servers' routes, over real HTTP: what a request gets is a function of its body. No model runs."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeAlias

from aiohttp import web

Route: TypeAlias = Callable[[Any], Any]
"""From the request's JSON (None without one) to a status and a body, at once or awaited: a text, or what becomes JSON."""


class FakeEngine:
    """``async with FakeEngine({"POST /generate": lambda body: (200, {...})}) as engine``; other routes are 404."""

    def __init__(self, routes: dict[str, Route]) -> None:
        self.routes = routes
        self.asked: list[tuple[str, Any]] = []
        """Route and body of every request, in order."""
        self.headers: list[dict[str, str]] = []
        self.port = 0
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def bodies(self, route: str) -> list[Any]:
        return [body for asked, body in self.asked if asked == route]

    async def start(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def _answer(self, request: web.Request) -> web.Response:
        raw = await request.read()
        route, body = f"{request.method} {request.path}", json.loads(raw) if raw else None
        self.asked.append((route, body))
        self.headers.append(dict(request.headers))
        if route not in self.routes:
            return web.json_response({"detail": "Not Found"}, status=404)
        answer = self.routes[route](body)
        status, content = await answer if inspect.isawaitable(answer) else answer
        if isinstance(content, str):
            return web.Response(text=content, status=status)
        return web.json_response(content, status=status)


def chat_answer(*texts: str) -> dict[str, Any]:
    """A chat answer as servers write it."""
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [
            {"index": i, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            for i, text in enumerate(texts)
        ],
    }
