"""MOCK of the vLLM routes that the SDK uses, for fast tests of latency, faults and versions. It holds no model.

Answers come from a function of the prompt's token ids. Nothing measured against it says anything about inference.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeAlias

Reply: TypeAlias = Callable[[list[int], int], Sequence[int]]
"""Completion ids for prompt ids and the index of the choice."""


@dataclass
class Faults:
    """What goes wrong, and how often."""

    refuse: int = 0
    """Next generations answered with HTTP 500."""
    drop: int = 0
    """Next generations whose connection is closed without an answer."""
    abort: int = 0
    """Next generations that end with finish_reason abort."""


@dataclass
class MockInferenceServer:
    """``async with MockInferenceServer(reply) as server`` listens on ``server.url``.

    Args:
        reply: completion ids, the terminator included, for each choice.
        weight_version: what it claims to run; "default" is what a fresh vLLM says.
        latency_s: time each generation takes.
    """

    reply: Reply
    weight_version: str = "0"
    latency_s: float = 0.0
    port: int = 0
    faults: Faults = field(default_factory=Faults)
    requests: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of the generations asked for."""
    version_changes_at: int | None = None
    """Output token index from which `next_version` samples, as after an update in flight."""
    next_version: str = "1"
    in_flight: int = 0
    max_in_flight: int = 0
    _server: asyncio.Server | None = None
    _connections: set[asyncio.StreamWriter] = field(default_factory=set)

    @property
    def url(self) -> str:
        """Base URL of the OpenAI-compatible routes."""
        return f"http://127.0.0.1:{self.port}/v1"

    async def start(self) -> None:
        """Listen; after stop() on the same port again."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """As a SIGKILL looks from outside: connections reset, port closed."""
        if self._server is not None:
            self._server.close()
            for writer in list(self._connections):
                writer.transport.abort()
            await self._server.wait_closed()
            self._server = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                method, path, *_ = head.split(b" ", 2)
                length = next(
                    (
                        int(line.split(b":")[1])
                        for line in head.lower().split(b"\r\n")
                        if line.startswith(b"content-length:")
                    ),
                    0,
                )
                body = await reader.readexactly(length)
                answer = await self._answer(method.decode(), path.decode(), json.loads(body) if body else {})
                if answer is None:
                    return
                status, content = answer
                payload = json.dumps(content).encode()
                writer.write(
                    f"HTTP/1.1 {status} MOCK\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n".encode()
                )
                writer.write(payload)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._connections.discard(writer)
            writer.close()

    async def _answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, Any] | None:
        match method, path:
            case "GET", "/health":
                return 200, {}
            case "GET", "/weight_info":
                return 200, {"weight_version": self.weight_version}
            case "GET", "/v1/models":
                return 200, {"object": "list", "data": [{"id": "mock", "object": "model"}]}
            case "POST", "/update_weight_version":
                self.weight_version = body["new_version"]
                return 200, {"success": True, "new_version": self.weight_version}
            case "POST", "/inference/v1/generate":
                return await self._generate(body)
        return 404, {"error": {"message": f"the mock has no {method} {path}"}}

    async def _generate(self, body: dict[str, Any]) -> tuple[int, Any] | None:
        self.requests.append(body)
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            await asyncio.sleep(self.latency_s)
        finally:
            self.in_flight -= 1
        if self.faults.drop > 0:
            self.faults.drop -= 1
            return None
        if self.faults.refuse > 0:
            self.faults.refuse -= 1
            return 500, {"error": {"message": "mock fault"}}
        is_aborted = self.faults.abort > 0
        self.faults.abort -= is_aborted
        sampling = body["sampling_params"]
        choices = [
            self._choice(body["token_ids"], index, sampling, is_aborted=is_aborted) for index in range(sampling["n"])
        ]
        # Engines finish choices in any order.
        return 200, {"choices": choices[::-1]}

    def _choice(self, prompt: list[int], index: int, sampling: dict[str, Any], *, is_aborted: bool) -> dict[str, Any]:
        whole = list(self.reply(prompt, index))
        token_ids = whole[: sampling.get("max_tokens") or len(whole)]
        finish_reason = "abort" if is_aborted else "stop" if len(token_ids) == len(whole) else "length"
        changes_at = min(self.version_changes_at or 0, len(token_ids))
        spans = [{"version": self.weight_version, "start": 0, "end": changes_at}] if changes_at else []
        spans.append(
            {
                "version": self.next_version if changes_at else self.weight_version,
                "start": changes_at,
                "end": len(token_ids),
            }
        )
        return {
            "index": index,
            "finish_reason": finish_reason,
            "token_ids": token_ids,
            "weight_versions": spans,
            "logprobs": {
                "content": [{"token_id": token, "logprob": -0.25 * (i + 1)} for i, token in enumerate(token_ids)]
            },
        }
