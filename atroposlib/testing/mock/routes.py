"""Which path of the mock speaks which wire."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from atroposlib.testing.mock import engine_wires, openai_wire
from atroposlib.testing.mock.codec import Codec
from atroposlib.testing.mock.generation import Outcome

if TYPE_CHECKING:
    from atroposlib.testing.mock_inference import MockInferenceServer

log = logging.getLogger(__name__)

T = TypeVar("T")
_Route: TypeAlias = Callable[[dict[str, Any]], Awaitable[tuple[int, Any] | None]]


class _UnreadableBodyError(Exception):
    """The client's mistake, not the policy's."""


class Truncated:
    """Content whose body will be cut."""

    def __init__(self, content: Any) -> None:
        self.content = content


class Routes:
    """Answers the requests of one server."""

    def __init__(self, server: MockInferenceServer) -> None:
        self._server = server

    async def answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, Any] | None:
        """Status and content; None: reset the connection."""
        if method == "POST" and (route := self._generation_route(path, body)) is not None:
            try:
                return await route(body)
            except _UnreadableBodyError as error:
                return 400, problem(f"{path}: {error}")
            except Exception as error:
                log.exception("the policy failed on %s", path)
                return 500, problem(f"the mock's policy failed: {type(error).__name__}: {error}")
        match method, path:
            case "GET", "/health" | "/health/" | "/health_generate" | "/ping":
                return 200, {}
            case "GET", "/v1/models":
                return 200, {"object": "list", "data": [{"id": self._server.model_name, "object": "model"}]}
            case "GET", "/weight_info":
                return 200, {"weight_version": self._server.weight_version}
            case "GET", "/get_model_info" | "/model_info" | "/get_weight_version":
                return 200, {
                    "model_path": self._server.model_name,
                    "tokenizer_path": self._server.model_name,
                    "is_generation": True,
                    "weight_version": self._server.weight_version,
                }
            case "GET", "/mock/stats":
                return 200, self._stats()
            case "POST", "/update_weight_version" | "/update_weights_from_disk" | "/mock/version":
                return self._update(body)
        return 404, problem(f"the mock has no {method} {path}")

    def _generation_route(self, path: str, body: dict[str, Any]) -> _Route | None:
        match path:
            case "/inference/v1/generate":
                return partial(self._engine, engine_wires.vllm_generation, engine_wires.vllm_answer)
            case "/v1/chat/completions":
                return self._chat
            case "/v1/completions":
                return self._completions
            case "/generate" if "prompt" in body:
                return partial(self._engine, engine_wires.bundled_generation, engine_wires.bundled_answer)
            case "/generate":
                return partial(self._engine, engine_wires.sglang_generation, engine_wires.sglang_answer)
            case "/generate/":
                return self._trl
        return None

    def _update(self, body: dict[str, Any]) -> tuple[int, Any]:
        version = body.get("version", body.get("new_version", body.get("weight_version")))
        if version is None and "model_path" not in body:
            return 400, problem('say which version: {"version": "4"}')
        # SGLang keeps its version when an update from disk names none.
        self._server.weight_version = self._server.weight_version if version is None else str(version)
        return 200, {"success": True, "message": "mock", "new_version": self._server.weight_version}

    def _read(self, read: Callable[[dict[str, Any], Codec], T], body: dict[str, Any]) -> T:
        try:
            return read(body, self._server.codec)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _UnreadableBodyError(f"cannot read the body: {type(error).__name__}: {error}") from error

    async def _engine(self, read: Any, write: Any, body: dict[str, Any]) -> tuple[int, Any] | None:
        asked = self._read(read, body)
        [outcome] = await self._server.generate(body, [asked])
        return self._finish(
            [outcome], lambda: write(body, asked, outcome.choices, self._server.codec, self._server.weight_version)
        )

    async def _chat(self, body: dict[str, Any]) -> tuple[int, Any] | None:
        if body.get("stream"):
            return 400, problem("the mock does not stream; ask with stream=false")
        asked = self._read(openai_wire.chat_generation, body)
        [outcome] = await self._server.generate(body, [asked])
        return self._finish(
            [outcome], lambda: openai_wire.chat_answer(body, asked, outcome.choices, self._server.codec)
        )

    async def _completions(self, body: dict[str, Any]) -> tuple[int, Any] | None:
        if body.get("stream"):
            return 400, problem("the mock does not stream; ask with stream=false")
        asked = self._read(openai_wire.text_generations, body)
        outcomes = await self._server.generate(body, asked)
        sampled = [outcome.choices for outcome in outcomes]
        return self._finish(outcomes, lambda: openai_wire.text_answer(body, asked, sampled, self._server.codec))

    async def _trl(self, body: dict[str, Any]) -> tuple[int, Any] | None:
        asked = self._read(engine_wires.trl_generations, body)
        outcomes = await self._server.generate(body, asked)
        return self._finish(outcomes, lambda: engine_wires.trl_answer(asked, [outcome.choices for outcome in outcomes]))

    def _finish(self, outcomes: Sequence[Outcome], write: Callable[[], Any]) -> tuple[int, Any] | None:
        faults = {outcome.fault for outcome in outcomes}
        if "drop" in faults:
            return None
        if "refuse" in faults:
            return 500, problem("mock fault")
        return 200, Truncated(write()) if "truncate" in faults else write()

    def _stats(self) -> dict[str, Any]:
        return {
            "in_flight": self._server.in_flight,
            "max_in_flight": self._server.max_in_flight,
            "routes": dict(self._server.routes),
            "totals": dict(self._server.totals),
            "weight_version": self._server.weight_version,
        }


def problem(text: str) -> dict[str, Any]:
    """An error's body, in OpenAI's form."""
    return {"error": {"message": text}}
