"""How to reach an inference server, and what every kind of server client can do."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from atroposlib.envs.server_handling.engines.adaptive_semaphore import AsyncSemWithAdaptiveWeight
from atroposlib.envs.server_handling.engines.http_client import is_infrastructure_failure
from atroposlib.envs.server_handling.engines.reasoning import VALID_REASONING_EFFORTS, ReasoningConfig, inject_reasoning
from atroposlib.envs.server_handling.engines.request_stats import RequestStats, request_metrics
from atroposlib.envs.server_handling.engines.samples import samples_from_lists
from atroposlib.envs.server_handling.engines.server_load import MAX_PAUSE_S, ServerLoad
from atroposlib.errors import ModelServerError

if TYPE_CHECKING:
    from openai.types import Completion
    from openai.types.chat import ChatCompletion

    from atroposlib.envs.server_handling.engines.engine_load import EngineLoad
    from atroposlib.envs.server_handling.engines.samples import TokenSamples

__all__ = [
    "VALID_REASONING_EFFORTS",
    "APIServer",
    "APIServerConfig",
    "AsyncSemWithAdaptiveWeight",
    "ReasoningConfig",
    "ServerBaseline",
    "ServerLoad",
]

log = logging.getLogger(__name__)

HEALTH_PERIOD_S = 1.0

T = TypeVar("T")


class ServerBaseline(BaseModel):
    """What all inference servers of a run have in common."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    timeout: int = Field(
        default=1200, gt=0, description="Seconds one request may take, retries and waiting for a dead server included."
    )
    num_max_requests_at_once: int = Field(default=512, ge=1, description="Requests in flight to one server.")
    num_requests_for_eval: int = Field(default=64, ge=1, description="Evaluation requests in flight to one server.")
    model_name: str = Field(default="default", description="Model name sent with each request.")
    rolling_buffer_length: int = Field(default=1000, description="Requests that the timing metrics look back on.")
    server_type: Literal["openai", "trl", "sglang", "vllm"] = Field(
        default="openai", description="What runs there; training needs token ids: vllm, sglang or a current trl."
    )
    tokenizer_name: str = Field(default="none", description="Tokenizer of the served model; none: the model name.")


class APIServerConfig(ServerBaseline):
    """One inference server."""

    api_key: str | None = Field(default="", description="Bearer token; empty: none is sent.")
    base_url: str | None = Field(
        default="", description="URL of the OpenAI-compatible routes, e.g. http://localhost:9001/v1."
    )
    n_kwarg_is_ignored: bool = Field(
        default=False, description="The server returns one choice whatever n says: ask n times."
    )
    health_check: bool = Field(
        default=True, description="Ask a server that failed whether it is well before using it again."
    )

    @property
    def root_url(self) -> str:
        """base_url without the trailing /v1: where health and native routes live."""
        return (self.base_url or "").rstrip("/").removesuffix("/v1")


class APIServer(ABC):
    """Client of one inference server. Subclasses speak its protocol; waiting for a slot and counting happen here.

    A subclass defines `_chat_completion_wrapper` and `_completion_wrapper`. If it can return token ids it also defines
    `_sample_tokens_wrapper`, or upstream's `_tokens_and_logprobs_completion_wrapper`, which knows no policy versions.
    It tells whether the server is well in `check_health`, or in upstream's endless `check_server_status_task`.

    Args:
        config: where the server is and how much it takes.
        reasoning_config: what chat requests ask about reasoning.
    """

    max_tries: int = 1
    """Attempts a request gets here when the server fails. The manager has its own over all servers, so here it is 1;
    raise it on a server that is used without one."""

    def __init__(self, config: APIServerConfig, reasoning_config: ReasoningConfig | None = None) -> None:
        self.config = config
        self.reasoning_config = reasoning_config
        self.server_healthy = True
        self.initialized = False
        """Whether a request was made."""
        self.check_task: asyncio.Task[None] | None = None
        """A subclass's own check_server_status_task, while it runs."""
        self.load = ServerLoad()
        self.require_version = False
        """Refuse tokens whose policy version the server does not say: set when the tokens will be trained on."""
        self.sem = AsyncSemWithAdaptiveWeight(config.num_max_requests_at_once)
        self.eval_sem = AsyncSemWithAdaptiveWeight(config.num_requests_for_eval)
        self._stats = RequestStats(config.rolling_buffer_length)
        self._eval_stats = RequestStats(config.rolling_buffer_length)
        self.request_timings, self.attempts_list = self._stats.timings, self._stats.attempts
        self.eval_request_timings, self.eval_attempts_list = self._eval_stats.timings, self._eval_stats.attempts

    # What a subclass speaks

    async def check_health(self) -> None:
        """Return if the server can work now. Without an own way to ask, a server is taken to be well.

        Raises:
            ModelServerError: why it cannot.
        """
        if type(self).check_server_status_task is APIServer.check_server_status_task:
            return
        if self.check_task is None or self.check_task.done():
            self.check_task = asyncio.create_task(self.check_server_status_task())
            # A check that needs no waiting has spoken after this.
            await asyncio.sleep(0)
        if not self.server_healthy:
            raise ModelServerError(f"inference server {self.config.base_url} does not call itself healthy yet")

    async def check_server_status_task(self, chat_completion: bool = True) -> None:
        """Keep `server_healthy` true to what check_health says, for ever. A subclass may replace it.

        Args:
            chat_completion: accepted as upstream; no check spends a completion.
        """
        while True:
            try:
                await self.check_health()
                self.server_healthy = True
            except ModelServerError:
                self.server_healthy = False
            await asyncio.sleep(HEALTH_PERIOD_S)

    @abstractmethod
    async def _chat_completion_wrapper(self, **kwargs: Any) -> ChatCompletion: ...

    @abstractmethod
    async def _completion_wrapper(self, **kwargs: Any) -> Completion: ...

    @property
    def returns_tokens(self) -> bool:
        """Whether rollouts can be made here: the subclass defines a token route."""
        return self._token_route() is not None

    async def _sample_tokens_wrapper(self, **kwargs: Any) -> TokenSamples:
        return samples_from_lists(*await self._tokens_and_logprobs_completion_wrapper(**kwargs))

    async def _tokens_and_logprobs_completion_wrapper(
        self, **kwargs: Any
    ) -> tuple[list[int], list[list[int]], list[list[float]], list[Any]]:
        if self._token_route() == "_sample_tokens_wrapper":
            return (await self._sample_tokens_wrapper(**kwargs)).as_lists()
        raise NotImplementedError(
            f"a server of type {self.config.server_type!r} does not return token ids, so nothing can be trained on it; "
            "use --openai.server_type vllm for rollouts"
        )

    async def _get_logprobs_wrapper(self, **kwargs: Any) -> dict[str, Any]:
        raise NotImplementedError(
            f"{type(self).__name__} does not implement get_logprobs; use --openai.server_type vllm or sglang"
        )

    def _token_route(self) -> str | None:
        """The token method of the most derived class that has one, so that either kind can be overridden."""
        routes = ("_sample_tokens_wrapper", "_tokens_and_logprobs_completion_wrapper")
        classes = type(self).__mro__[: type(self).__mro__.index(APIServer)]
        return next((route for cls in classes for route in routes if route in vars(cls)), None)

    async def current_version(self) -> int | None:
        """The published policy version that the server runs now; None where it cannot tell, or runs none."""
        return None

    async def engine_load(self) -> EngineLoad | None:
        """How loaded the engine says it is; None where it never says.

        Raises:
            ModelServerError: it did not say this time.
        """
        return None

    async def close(self) -> None:
        """Close connections and end the health check."""
        if self.check_task is not None:
            self.check_task.cancel()
            await asyncio.gather(self.check_task, return_exceptions=True)

    # What callers use

    async def chat_completion(self, **kwargs: Any) -> ChatCompletion:
        """One chat request; the answer is the openai package's object. `split="eval"` uses the evaluation slots."""
        return await self._request(self._chat_completion_wrapper, self._inject_reasoning_kwargs(kwargs))

    async def completion(self, **kwargs: Any) -> Completion:
        """One completion request; the answer is the openai package's object."""
        return await self._request(self._completion_wrapper, kwargs)

    async def sample_tokens(self, **kwargs: Any) -> TokenSamples:
        """Sample from `input_ids` (or `prompt`): the engine's own token ids, logprobs and policy versions."""
        is_native = self._token_route() == "_sample_tokens_wrapper"
        call = self._sample_tokens_wrapper if is_native else partial(APIServer._sample_tokens_wrapper, self)
        samples = await self._request(call, kwargs)
        self.load.sampled_tokens += sum(len(completion.token_ids) for completion in samples.completions)
        self.load.completions += len(samples.completions)
        return samples

    async def tokens_and_logprobs_completion(
        self, **kwargs: Any
    ) -> tuple[list[int], list[list[int]], list[list[float]], list[str]]:
        """As sample_tokens, in the upstream form: prompt tokens, outputs, logprobs, finish reasons."""
        return (await self.sample_tokens(**kwargs)).as_lists()

    async def get_logprobs(self, **kwargs: Any) -> dict[str, Any]:
        """Logprobs of the prompt itself, given as `input_ids` or `prompt`, with the `top_k` most likely tokens.

        Returns:
            prompt_tokens: [T]; prompt_topk_token_ids and prompt_topk_logprobs: for each position the candidates and
            their logprobs in nats, the prompt's own token first; empty where the engine computes none (the first).
        Raises:
            NotImplementedError: this kind of server cannot.
        """
        return await self._request(self._get_logprobs_wrapper, kwargs)

    async def update_weight(self, weight: float) -> None:
        """Use only this share, from 0 to 1, of the server's slots: the rest is for other environments."""
        self.sem.update_weight(weight)
        self.eval_sem.update_weight(weight)

    async def wandb_metrics(
        self, metrics_dict: dict[str, Any] | None = None, server_name: str | None = None
    ) -> dict[str, Any]:
        """Add the timings of the latest requests to a dictionary of metrics, and return it."""
        metrics = {} if metrics_dict is None else metrics_dict
        metrics.update(request_metrics(server_name or self.config.model_name, self._stats, self._eval_stats))
        return metrics

    def _inject_reasoning_kwargs(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return inject_reasoning(kwargs, self.reasoning_config, self.config.base_url)

    async def _request(self, call: Callable[..., Awaitable[T]], kwargs: dict[str, Any]) -> T:
        """Call with up to max_tries attempts; the last failure is raised as it is."""
        kwargs = {**kwargs, "model": self.config.model_name}
        is_eval = kwargs.pop("split", "train") != "train"
        self.initialized = True
        start = time.monotonic()
        for attempt in range(1, self.max_tries):
            try:
                return await self._attempt(call, kwargs, is_eval=is_eval, attempt=attempt, start=start)
            except ModelServerError as error:
                pause_s = random.uniform(0.5, 1.0) * min(0.5 * 2**attempt, MAX_PAUSE_S)
                if time.monotonic() + pause_s > start + self.config.timeout:
                    raise
                log.debug("trying again in %.1f s: %s", pause_s, error)
                await asyncio.sleep(pause_s)
        return await self._attempt(call, kwargs, is_eval=is_eval, attempt=max(self.max_tries, 1), start=start)

    async def _attempt(
        self, call: Callable[..., Awaitable[T]], kwargs: dict[str, Any], *, is_eval: bool, attempt: int, start: float
    ) -> T:
        # Counted before the slot is there: who waits for a slot is load too, and the manager chooses by it.
        self.load.in_flight += 1
        self.load.eval_in_flight += is_eval
        try:
            async with self.eval_sem if is_eval else self.sem:
                self.load.requests += 1
                answer = await self._call(call, kwargs)
        except ModelServerError:
            self._mark_failed()
            raise
        finally:
            self.load.in_flight -= 1
            self.load.eval_in_flight -= is_eval
        self.load.failures_in_a_row = 0
        self.server_healthy = True
        (self._eval_stats if is_eval else self._stats).record(time.monotonic() - start, attempt)
        return answer

    async def _call(self, call: Callable[..., Awaitable[T]], kwargs: dict[str, Any]) -> T:
        try:
            return await call(**kwargs)
        except Exception as error:
            # Subclasses of users raise what their client library raises.
            if is_infrastructure_failure(error):
                raise ModelServerError(
                    f"inference server {self.config.base_url}: {type(error).__name__}: {error}"
                ) from error
            raise

    def _mark_failed(self) -> None:
        self.load.note_failure()
        if self.server_healthy:
            self.server_healthy = False
            log.warning("inference server failed, leaving it alone until it is well: %s", self.config.base_url)

    async def recover(self) -> bool:
        """Ask a failed server whether it is well again, at most once per pause."""
        if self.server_healthy:
            return True
        if time.monotonic() < self.load.retry_at:
            return False
        self.load.retry_at = time.monotonic() + MAX_PAUSE_S
        try:
            if self.config.health_check:
                await self.check_health()
        except ModelServerError as error:
            log.debug("inference server is still down: %s", error)
            self.load.retry_at = time.monotonic() + random.uniform(0.5, 1.0)
            return False
        log.info("inference server is well: %s", self.config.base_url)
        self.server_healthy = True
        return True
