"""One question to a judge model: over HTTP, or whatever a test puts in its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from atroposlib.envs.server_handling.engines.http_client import EngineHttp
from atroposlib.errors import ModelServerError
from atroposlib.rim.config import ModelConfig, RIMConfig
from atroposlib.rim.endpoints import Endpoint, endpoint_of
from atroposlib.rim.trajectory import text_of

FIX = "look at rim.models, model_configs.*.base_url and the variable of the key"


@dataclass(frozen=True)
class JudgeCall:
    """What is asked."""

    judge: str
    prompt: str
    temperature: float
    nth: int = 0
    """Asked so often before at the same temperature: each time is a sample of its own."""
    is_large: bool = False
    """The large model is asked."""
    broken_answer: str = ""
    """What the judge said first, where this is a repair; `prompt` is then unchanged."""
    repair: str = ""
    """What it is told about that."""

    @property
    def messages(self) -> list[dict[str, str]]:
        """As a chat."""
        asked = [{"role": "user", "content": self.prompt}]
        if self.repair:
            asked.append({"role": "assistant", "content": self.broken_answer})
            asked.append({"role": "user", "content": self.repair})
        return asked


@dataclass(frozen=True)
class JudgeReply:
    """What came back."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Ask(Protocol):
    """Asks a judge model once."""

    async def __call__(self, call: JudgeCall) -> JudgeReply:
        """The model's answer.

        Raises:
            ModelServerError: the server failed; another try may succeed.
            RolloutError: the server refused this request.
            ConfigError: the address, the model or the key is wrong.
        """
        ...


class ChatAsk:
    """Asks through the chat routes of the two models' servers.

    Raises:
        ConfigError: a model's name leads nowhere, or its key is not set.
    """

    def __init__(self, config: RIMConfig) -> None:
        self.small = _Model(config.models.small_model, config.model_configs.default, config.judge_timeout)
        self.large = None
        if config.models.large_model is not None:
            self.large = _Model(config.models.large_model, config.model_configs.large, config.judge_timeout)

    async def __call__(self, call: JudgeCall) -> JudgeReply:
        """The model's answer; raises as Ask says."""
        model = self.large if call.is_large and self.large is not None else self.small
        return await model.ask(call)

    async def close(self) -> None:
        """Close the connections."""
        try:
            await self.small.http.close()
        finally:
            if self.large is not None:
                await self.large.http.close()


class _Model:
    def __init__(self, name: str, config: ModelConfig, timeout_s: float) -> None:
        self.endpoint: Endpoint = endpoint_of(name, config)
        self.config = config
        self.http = EngineHttp(f"judge {self.endpoint}", api_key=self.endpoint.api_key, timeout_s=timeout_s)

    async def ask(self, call: JudgeCall) -> JudgeReply:
        body: dict[str, Any] = {
            "model": self.endpoint.model,
            "messages": call.messages,
            "temperature": call.temperature,
            self.endpoint.tokens_field: self.config.max_tokens,
        }
        if self.config.response_format == "json":
            body["response_format"] = {"type": "json_object"}
        answer = await self.http.post(f"{self.endpoint.base_url}/chat/completions", body)
        return _reply(self.http.read(answer, "/chat/completions", fix=FIX), str(self.endpoint))


def _reply(body: Any, server: str) -> JudgeReply:
    try:
        # A text, or a list of parts.
        text = text_of({"content": body["choices"][0]["message"]["content"]})
        usage = body.get("usage")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ModelServerError(f"judge {server}: an answer without choices: {str(body)[:200]}") from error
    return JudgeReply(text, _count(usage, "prompt_tokens"), _count(usage, "completion_tokens"))


def _count(usage: Any, name: str) -> int:
    value = usage.get(name) if isinstance(usage, Mapping) else None
    return value if isinstance(value, int) else 0
