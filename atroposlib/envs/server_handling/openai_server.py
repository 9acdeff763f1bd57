"""Any OpenAI-compatible server through the openai package: evaluation, judges. It returns text, so nothing trains on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx

from atroposlib.envs.server_handling.server_baseline import APIServer, APIServerConfig
from atroposlib.errors import ConfigError, ModelServerError, RolloutError

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from openai.types import Completion
    from openai.types.chat import ChatCompletion

HEALTH_TIMEOUT_S = 2.0


class OpenAIServer(APIServer):
    """Chat and text completions."""

    def __init__(self, config: APIServerConfig, reasoning_config: Any = None) -> None:
        super().__init__(config, reasoning_config)
        if config.base_url == "":
            raise ConfigError("an inference server needs a base_url, e.g. --openai.base_url http://localhost:9001/v1")
        self._openai: AsyncOpenAI | None = None
        self._http: httpx.AsyncClient | None = None

    @property
    def openai(self) -> AsyncOpenAI:
        """The SDK's client, made at first use: importing the package costs half a second."""
        if self._openai is None:
            from openai import AsyncOpenAI

            # The package refuses an empty key; local servers ignore it. We retry ourselves, over all servers.
            self._openai = AsyncOpenAI(
                base_url=self.config.base_url,
                api_key=self.config.api_key or "none",
                timeout=self.config.timeout,
                max_retries=0,
            )
        return self._openai

    @property
    def http(self) -> httpx.AsyncClient:
        """Connection to the server's native routes."""
        if self._http is None:
            headers = {"Authorization": f"Bearer {self.config.api_key}"} if self.config.api_key else {}
            # The number of requests is bounded by our semaphores; a second bound in the pool would only add a queue.
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
            self._http = httpx.AsyncClient(
                base_url=self.config.root_url,
                headers=headers,
                limits=limits,
                timeout=httpx.Timeout(self.config.timeout, connect=5.0),
            )
        return self._http

    async def close(self) -> None:
        """Close the connections."""
        if self._openai is not None:
            await self._openai.close()
        if self._http is not None:
            await self._http.aclose()

    async def check_health(self) -> None:
        """Any answer below 500 to GET /models: routes and keys differ between providers, being alive does not."""
        try:
            response = await self.http.get("/v1/models", timeout=HEALTH_TIMEOUT_S)
        except httpx.TransportError as error:
            raise self._error("GET /v1/models", error) from error
        if response.status_code >= 500:
            raise ModelServerError(
                f"inference server {self.config.base_url}: GET /v1/models answered {response.status_code}"
            )

    async def _chat_completion_wrapper(self, **kwargs: Any) -> ChatCompletion:
        answer: ChatCompletion = _merge_choices(await self._with_n(self.openai.chat.completions.create, kwargs))
        return answer

    async def _completion_wrapper(self, **kwargs: Any) -> Completion:
        answer: Completion = _merge_choices(await self._with_n(self.openai.completions.create, kwargs))
        return answer

    async def _with_n(self, create: Any, kwargs: dict[str, Any]) -> list[Any]:
        """Ask until n choices are there: some servers ignore n."""
        n = kwargs.get("n") or 1
        answers = [await self._ask(create, {**kwargs, "n": 1} if self.config.n_kwarg_is_ignored else kwargs)]
        while sum(len(answer.choices) for answer in answers) < n:
            self.config.n_kwarg_is_ignored = True
            answers.append(await self._ask(create, {**kwargs, "n": 1}))
        return answers

    async def _ask(self, create: Any, kwargs: dict[str, Any]) -> Any:
        import openai

        try:
            return await create(**kwargs)
        except (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError) as error:
            raise self._error("completion", error) from error
        except openai.BadRequestError as error:
            raise RolloutError(f"inference server {self.config.base_url} refused the request: {error}") from error
        except openai.NotFoundError as error:
            raise ConfigError(
                f"inference server {self.config.base_url}: {error}; is openai.model_name {self.config.model_name!r} right?"
            ) from error

    def _error(self, what: str, error: Exception) -> ModelServerError:
        return ModelServerError(f"inference server {self.config.base_url}: {what}: {type(error).__name__}: {error}")


def _merge_choices(answers: list[Any]) -> Any:
    choices = [choice for answer in answers for choice in answer.choices]
    for index, choice in enumerate(choices):
        choice.index = index
    return answers[0].model_copy(update={"choices": choices})
