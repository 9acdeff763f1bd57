"""Any OpenAI-compatible server: evaluation, judges. It returns text, so nothing trains on it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from atroposlib.envs.command_line.server_choice import Servers, resolve_servers
from atroposlib.envs.gathering import all_or_none
from atroposlib.envs.server_handling.engines.engine_load import EngineLoad, parse_engine_load
from atroposlib.envs.server_handling.engines.http_client import EngineHttp
from atroposlib.envs.server_handling.engines.reasoning import ReasoningConfig
from atroposlib.envs.server_handling.server_baseline import APIServer, APIServerConfig
from atroposlib.errors import ConfigError, ModelServerError

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from openai.types import Completion
    from openai.types.chat import ChatCompletion

__all__ = ["APIServerConfig", "OpenAIServer", "resolve_openai_configs"]

log = logging.getLogger(__name__)

HEALTH_TIMEOUT_S = 2.0
OPENAI_URL = "https://api.openai.com/v1"

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")


class OpenAIServer(APIServer):
    """Chat and text completions, with the arguments of the openai package's `create` methods.

    The package's own client costs more time than the connection, so requests go out directly; `openai` is that client
    for whoever wants it.
    """

    def __init__(self, config: APIServerConfig, reasoning_config: ReasoningConfig | None = None) -> None:
        super().__init__(config, reasoning_config)
        if config.base_url == "":
            raise ConfigError("an inference server needs a base_url, e.g. --openai.base_url http://localhost:9001/v1")
        self.api_url = (config.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL).rstrip("/")
        self.root_url = self.api_url.removesuffix("/v1")
        """Where health and native routes live."""
        self.http = EngineHttp(f"inference server {self.api_url}", api_key=self._api_key, timeout_s=config.timeout)
        self._openai: AsyncOpenAI | None = None
        self._has_metrics = True

    @property
    def openai(self) -> AsyncOpenAI:
        """The openai package's client, made at first use: importing the package costs half a second."""
        if self._openai is None:
            from openai import AsyncOpenAI

            # The package refuses an empty key; local servers ignore it. Retries are ours, over all servers.
            self._openai = AsyncOpenAI(
                base_url=self.api_url,
                api_key=self._api_key or "none",
                timeout=self.config.timeout,
                max_retries=0,
                http_client=_aiohttp_client(self.config.timeout),
            )
        return self._openai

    @property
    def _api_key(self) -> str | None:
        # None, unlike an empty key, means the one in the environment.
        return os.environ.get("OPENAI_API_KEY") if self.config.api_key is None else self.config.api_key

    async def close(self) -> None:
        """Close the connections."""
        await super().close()
        if self._openai is not None:
            await self._openai.close()
        await self.http.close()

    async def check_health(self) -> None:
        """Any answer below 500 to GET /models: routes and keys differ between providers, being alive does not."""
        answer = await self.http.get(f"{self.api_url}/models", timeout_s=HEALTH_TIMEOUT_S)
        if answer.status >= 500:
            raise ModelServerError(f"inference server {self.api_url}: GET /models answered {answer.status}")

    async def engine_load(self) -> EngineLoad | None:
        """From the engine's Prometheus page; an engine that was found to have none is not asked again.

        Raises:
            ModelServerError: the page did not come this time.
        """
        if not self._has_metrics:
            return None
        answer = await self.http.get(f"{self.root_url}/metrics", timeout_s=HEALTH_TIMEOUT_S)
        self._has_metrics = answer.status not in (401, 403, 404, 405)
        if not self._has_metrics:
            return None
        if answer.status != 200:
            raise ModelServerError(f"inference server {self.api_url}: GET /metrics answered {answer.status}")
        return parse_engine_load(answer.body.decode("utf-8", errors="replace"))

    async def _chat_completion_wrapper(self, **kwargs: Any) -> ChatCompletion:
        from openai.types.chat import ChatCompletion

        return await self._complete("/chat/completions", ChatCompletion, kwargs)

    async def _completion_wrapper(self, **kwargs: Any) -> Completion:
        from openai.types import Completion

        return await self._complete("/completions", Completion, kwargs)

    async def _complete(self, route: str, model: type[M], kwargs: dict[str, Any]) -> M:
        """Ask until n choices are there: some servers ignore n."""
        n = kwargs.get("n") or 1
        answers = [await self._ask(route, {**kwargs, "n": 1} if self.config.n_kwarg_is_ignored else kwargs)]
        missing = n - len(answers[0]["choices"])
        if missing > 0:
            if not self.config.n_kwarg_is_ignored:
                log.warning("%s returned too few choices for n=%d: asking once for each", self.api_url, n)
                self.config.n_kwarg_is_ignored = True
            answers += await all_or_none([self._ask(route, {**kwargs, "n": 1}) for _ in range(missing)])
        answer = {**answers[0], "choices": [choice for answer in answers for choice in answer["choices"]]}
        for index, choice in enumerate(answer["choices"]):
            choice["index"] = index
        return _made(model, answer)

    async def _ask(self, route: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        if kwargs.get("stream"):
            raise ConfigError("stream=True is not supported here: answers come whole; use server.openai to stream")
        answer = await self.http.post(
            f"{self.api_url}{route}",
            request_body(kwargs),
            timeout_s=_seconds(kwargs.get("timeout")),
            headers=kwargs.get("extra_headers"),
            params=kwargs.get("extra_query"),
        )
        fix = f"is openai.model_name {self.config.model_name!r} right, and openai.api_key?"
        content = self.http.read(answer, route, fix=fix)
        # Some gateways report their failures with status 200.
        if not isinstance(content, dict) or not content.get("choices"):
            raise ModelServerError(f"inference server {self.api_url}: {route} gave no choices: {answer.text}")
        return content


def request_body(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON body of a completion request: what the openai package's `create` would send for these arguments."""
    transport = ("extra_body", "extra_headers", "extra_query", "timeout")
    body = {
        name: value for name, value in kwargs.items() if name not in transport and type(value).__name__ not in _ABSENT
    }
    return {**body, **(kwargs.get("extra_body") or {})}


# The openai package's marks for an argument that was not given, by name: the package may not be loaded.
_ABSENT = ("NotGiven", "Omit")


def resolve_openai_configs(
    default_server_configs: Servers | None,
    openai_config_dict: Mapping[str, Any] | None,
    yaml_config: Mapping[str, Any],
    cli_passed_flags: Mapping[str, Any],
    logger: logging.Logger | None = None,
) -> Servers | None:
    """The inference servers of an environment: its defaults, changed by the file and the flags; flags win.

    Args:
        openai_config_dict: accepted as upstream; defaults, file and flags say all that it says.
        yaml_config: the whole file; its section `openai` counts.
        cli_passed_flags: flags as written, e.g. `openai.base_url`; others are left out.
        logger: accepted as upstream.
    """
    prefix = "openai."
    flags = {name.removeprefix(prefix): value for name, value in cli_passed_flags.items() if name.startswith(prefix)}
    return resolve_servers(default_server_configs, yaml_config.get("openai"), flags)


def _made(model: type[M], content: dict[str, Any]) -> M:
    """The package's object. Providers add fields and leave some out: none of that is an error."""
    try:
        return model.model_validate(content)
    except ValidationError:
        # What the package itself does, and twenty times slower: it checks nothing.
        return model.construct(**content)


def _seconds(timeout: Any) -> float | None:
    return float(timeout) if isinstance(timeout, int | float) else None


def _aiohttp_client(timeout_s: float) -> Any:
    """The package's client over aiohttp, without a bound of its own; None (its default) where it cannot make one."""
    import openai

    limits = type(openai.DEFAULT_CONNECTION_LIMITS)
    try:
        # 0 is aiohttp's "no limit"; None would become its default of 100.
        return openai.DefaultAioHttpClient(limits=limits(max_connections=0), timeout=timeout_s)
    except RuntimeError:
        return None
