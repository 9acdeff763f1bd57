"""One look at a running engine: is it well, is it paused, which weights does it run; and the call that resumes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self, TypeAlias

import httpx

EngineName: TypeAlias = Literal["vllm", "sglang"]

LOOK_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Look:
    """What an engine said. None: it did not say."""

    is_healthy: bool
    is_paused: bool | None = None
    weight_version: str | None = None

    @property
    def policy_version(self) -> int | None:
        """The published version; None for the weights that it was started with."""
        version = self.weight_version or ""
        return int(version) if version.isascii() and version.isdecimal() else None


class EngineWindow:
    """Looks at one engine; use as ``async with EngineWindow(url, "vllm") as window``.

    Args:
        url: of the server, without /v1.
        engine: whose routes it has. SGLang does not say whether it is paused.
    """

    def __init__(self, url: str, engine: EngineName, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.engine = engine
        self._http = httpx.AsyncClient(base_url=url, timeout=LOOK_TIMEOUT_S, transport=transport, trust_env=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def look(self) -> Look:
        """Ask it. Whatever does not answer in time is None, and an engine that says nothing at all is not well."""
        if await self._get("/health") is None:
            return Look(is_healthy=False)
        weights = await self._get("/weight_info" if self.engine == "vllm" else "/model_info") or {}
        pause = await self._get("/is_paused") if self.engine == "vllm" else None
        version = weights.get("weight_version")
        return Look(
            is_healthy=True,
            is_paused=bool(pause["is_paused"]) if pause and "is_paused" in pause else None,
            weight_version=None if version is None else str(version),
        )

    async def resume(self) -> bool:
        """Let generation go on; whether the engine said yes."""
        route = "/resume" if self.engine == "vllm" else "/continue_generation"
        try:
            return (await self._http.post(route, json={})).is_success
        except httpx.TransportError:
            return False

    async def _get(self, route: str) -> dict[str, object] | None:
        """Its answer; empty where it is no object, None where there is none."""
        try:
            response = await self._http.get(route)
        except httpx.TransportError:
            return None
        if not response.is_success:
            return None
        try:
            answer = response.json()
        except ValueError:
            return {}
        return answer if isinstance(answer, dict) else {}
