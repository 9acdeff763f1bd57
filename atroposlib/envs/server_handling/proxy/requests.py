"""What the managed-server proxy is configured with and asked for."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from atroposlib.envs.server_handling.server_baseline import APIServerConfig

_NOT_SAMPLING = frozenset({"messages", "tools", "tool_choice", "model", "stream", "stream_options", "user", "store"})
"""Fields of a chat request that say nothing about sampling."""


class ProxyServer(BaseModel):
    """One inference server of the proxy."""

    base_url: str
    api_key: str = ""
    server_type: Literal["openai", "trl", "sglang", "vllm"] = "vllm"
    num_max_requests_at_once: int = Field(default=512, ge=1)
    num_requests_for_eval: int = Field(default=64, ge=1)
    timeout: int = Field(default=1200, gt=0)


class ProxyConfig(BaseModel):
    """The configuration file, and the body of POST /setup."""

    model_config = ConfigDict(protected_namespaces=())

    model_name: str
    tokenizer_name: str | None = None
    servers: list[ProxyServer] = Field(min_length=1)

    def server_configs(self) -> list[APIServerConfig]:
        """For a ServerManager."""
        names = {"model_name": self.model_name, "tokenizer_name": self.tokenizer_name or "none"}
        return [APIServerConfig.model_validate({**server.model_dump(), **names}) for server in self.servers]


class CreateSession(BaseModel):
    """What a new session is like."""

    tool_parser: str | None = "hermes"
    track_tree: bool = False
    base_url: str | None = None


class ChatRequest(BaseModel):
    """An OpenAI chat request; further fields are sampling options and go to the engine."""

    model_config = ConfigDict(extra="allow")

    messages: list[dict[str, Any]]
    max_tokens: int | None = 1024
    temperature: float | None = 1.0
    n: int | None = Field(default=1, ge=1)
    stop: str | list[str] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    stream: bool | None = None

    def sampling(self) -> dict[str, Any]:
        """The options for the engine."""
        options = {name: value for name, value in self if name not in _NOT_SAMPLING and value is not None}
        if "max_completion_tokens" in options and "max_tokens" not in self.model_fields_set:
            del options["max_tokens"]
        return options
