"""How to reach an inference server, and what every kind of server client can do."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from atroposlib.errors import ModelServerError

if TYPE_CHECKING:
    from openai.types import Completion
    from openai.types.chat import ChatCompletion

    from atroposlib.envs.server_handling.samples import TokenSamples

log = logging.getLogger(__name__)

MAX_PAUSE_S = 5.0
EVAL_SPLIT = "eval"

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
    rolling_buffer_length: int = Field(default=1000, description="Accepted as upstream; unused.")
    server_type: Literal["openai", "trl", "sglang", "vllm"] = Field(
        default="openai", description="What runs there; training needs token ids: vllm."
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


@dataclass
class ServerLoad:
    """What one server is doing, counted on this side."""

    in_flight: int = 0
    requests: int = 0
    failures: int = 0
    sampled_tokens: int = 0
    completions: int = 0
    failures_in_a_row: int = 0
    retry_at: float = field(default=0.0, repr=False)
    """Monotonic time before which a server that failed is left alone."""


class APIServer(ABC):
    """Client of one inference server. Subclasses speak its protocol; waiting, retrying and counting happen here.

    Args:
        config: where the server is and how much it takes.
    """

    def __init__(self, config: APIServerConfig, reasoning_config: Any = None) -> None:
        self.config = config
        self.reasoning_config = reasoning_config
        self.server_healthy = True
        self.load = ServerLoad()
        self.require_version = False
        """Refuse tokens whose policy version the server does not say: set when the tokens will be trained on."""
        self.sem = asyncio.Semaphore(config.num_max_requests_at_once)
        self.eval_sem = asyncio.Semaphore(config.num_requests_for_eval)

    # What a subclass speaks

    @abstractmethod
    async def check_health(self) -> None:
        """Return if the server can work now.

        Raises:
            ModelServerError: why it cannot.
        """

    @abstractmethod
    async def _chat_completion_wrapper(self, **kwargs: Any) -> ChatCompletion: ...

    @abstractmethod
    async def _completion_wrapper(self, **kwargs: Any) -> Completion: ...

    @property
    def returns_tokens(self) -> bool:
        """Whether rollouts can be made here: the subclass defines the token route."""
        return type(self)._sample_tokens_wrapper is not APIServer._sample_tokens_wrapper

    async def _sample_tokens_wrapper(self, **kwargs: Any) -> TokenSamples:
        raise NotImplementedError(
            f"a server of type {self.config.server_type!r} does not return token ids, so nothing can be trained on it; "
            "use --openai.server_type vllm for rollouts"
        )

    async def close(self) -> None:
        """Close connections."""
        return

    # What callers use

    async def chat_completion(self, **kwargs: Any) -> ChatCompletion:
        """One chat request; the answer is the openai package's object. `split="eval"` uses the evaluation slots."""
        return await self._request(self._chat_completion_wrapper, kwargs)

    async def completion(self, **kwargs: Any) -> Completion:
        """One completion request; the answer is the openai package's object."""
        return await self._request(self._completion_wrapper, kwargs)

    async def sample_tokens(self, **kwargs: Any) -> TokenSamples:
        """Sample from `input_ids` (or `prompt`): the engine's own token ids, logprobs and policy versions."""
        samples = await self._request(self._sample_tokens_wrapper, kwargs)
        self.load.sampled_tokens += sum(len(completion.token_ids) for completion in samples.completions)
        self.load.completions += len(samples.completions)
        return samples

    async def tokens_and_logprobs_completion(
        self, **kwargs: Any
    ) -> tuple[list[int], list[list[int]], list[list[float]], list[str]]:
        """As sample_tokens, in the upstream form: prompt tokens, outputs, logprobs, finish reasons."""
        return (await self.sample_tokens(**kwargs)).as_lists()

    async def _request(self, call: Callable[..., Awaitable[T]], kwargs: dict[str, Any]) -> T:
        kwargs = {**kwargs, "model": self.config.model_name}
        sem = self.eval_sem if kwargs.pop("split", "train") != "train" else self.sem
        # Counted before the slot is there: who waits for a slot is load too, and the manager chooses by it.
        self.load.in_flight += 1
        try:
            async with sem:
                self.load.requests += 1
                answer = await call(**kwargs)
        except ModelServerError:
            self._mark_failed()
            raise
        else:
            self.load.failures_in_a_row = 0
            self.server_healthy = True
            return answer
        finally:
            self.load.in_flight -= 1

    def _mark_failed(self) -> None:
        self.load.failures += 1
        self.load.failures_in_a_row += 1
        pause_s = min(0.25 * 2 ** min(self.load.failures_in_a_row, 8), MAX_PAUSE_S)
        self.load.retry_at = time.monotonic() + pause_s * random.uniform(0.5, 1.0)
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
