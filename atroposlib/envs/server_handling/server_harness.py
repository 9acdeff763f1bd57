"""Canned answers in the place of an inference server: for tests of environments."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from atroposlib.envs.server_handling.engines.samples import TokenSamples, samples_from_lists
from atroposlib.envs.server_handling.server_baseline import APIServer, APIServerConfig
from atroposlib.errors import RolloutError

if TYPE_CHECKING:
    from openai.types import Completion
    from openai.types.chat import ChatCompletion

FinishReason: TypeAlias = Literal["stop", "length", "tool_calls", "content_filter", "function_call"]
TokenLists: TypeAlias = tuple[list[int], list[list[int]], list[list[float]], list[Any]]


class ServerHarness(APIServer):
    """An inference server that knows the answers it was told; to anything else it answers None.

    Only sample_tokens, which has no empty answer, raises where it was told nothing.
    """

    def __init__(self, config: APIServerConfig | None = None, reasoning_config: Any = None) -> None:
        super().__init__(config or APIServerConfig(base_url="", model_name="test_model"), reasoning_config)
        self.response_map: dict[str, ChatCompletion | Completion] = {}
        self.tokens_and_logprobs_map: dict[str, TokenLists] = {}
        self.sem = asyncio.Semaphore(1)  # type: ignore[assignment]
        self.eval_sem = asyncio.Semaphore(1)  # type: ignore[assignment]

    def conv_to_dictkey(self, input_message: Sequence[dict[str, Any]]) -> str:
        """The key of a conversation: a line for each role and each content."""
        return "\n".join(f"role:{message['role']}\ncontent:{message['content']}" for message in input_message)

    def set_desired_response(self, input_message: Sequence[dict[str, Any]], desired_response: ChatCompletion) -> None:
        """What to answer to a conversation."""
        self.response_map[self.conv_to_dictkey(input_message)] = desired_response

    def set_desired_completion(self, input_message: str, completion: Completion) -> None:
        """What to answer to a text."""
        self.response_map[input_message] = completion

    def set_tokens_and_logprobs_response(
        self,
        prompt: str,
        prompt_tokens: list[int],
        output_tokens_list: list[list[int]],
        output_logprobs_list: list[list[float]],
        finish_reasons: list[Any],
    ) -> None:
        """What to sample for a prompt, given as text or as these prompt tokens."""
        self.tokens_and_logprobs_map[prompt] = (
            prompt_tokens,
            output_tokens_list,
            output_logprobs_list,
            finish_reasons,
        )

    async def chat_completion(self, *args: Any, **kwargs: Any) -> ChatCompletion:
        """The answer set for `messages`; None when there is none."""
        return await super().chat_completion(**({"messages": args[0]} if args else {}), **kwargs)

    async def completion(self, *args: Any, **kwargs: Any) -> Completion:
        """The answer set for `prompt`; None when there is none."""
        return await super().completion(**({"prompt": args[0]} if args else {}), **kwargs)

    async def tokens_and_logprobs_completion(self, **kwargs: Any) -> TokenLists:
        """The tokens set for `prompt`, or for `input_ids`; None when there are none."""
        found: Any = self._tokens_for(kwargs)
        lists: TokenLists = found
        return lists

    async def update_weight(self, weight: float) -> None:
        """Nothing: a harness is not shared."""

    async def _chat_completion_wrapper(self, **kwargs: Any) -> ChatCompletion:
        answer: Any = self.response_map.get(self.conv_to_dictkey(kwargs["messages"]))
        chat: ChatCompletion = answer
        return chat

    async def _completion_wrapper(self, **kwargs: Any) -> Completion:
        answer: Any = self.response_map.get(kwargs["prompt"])
        completion: Completion = answer
        return completion

    async def _sample_tokens_wrapper(self, **kwargs: Any) -> TokenSamples:
        found = self._tokens_for(kwargs)
        if found is None:
            asked = kwargs.get("prompt") or kwargs.get("input_ids")
            raise RolloutError(
                f"the test harness has no tokens for the prompt {asked!r}; it knows "
                f"{list(self.tokens_and_logprobs_map) or 'none'}: call set_tokens_and_logprobs_response first"
            )
        return samples_from_lists(*found)

    def _tokens_for(self, kwargs: dict[str, Any]) -> TokenLists | None:
        prompt, input_ids = kwargs.get("prompt"), kwargs.get("input_ids")
        if prompt in self.tokens_and_logprobs_map:
            return self.tokens_and_logprobs_map[str(prompt)]
        return next((lists for lists in self.tokens_and_logprobs_map.values() if lists[0] == input_ids), None)


def create_chat_completion(
    resp: str | list[str], n: int = 1, finish_reason: FinishReason | list[FinishReason] = "stop"
) -> ChatCompletion:
    """A chat answer with these texts; one text is repeated n times."""
    from openai.types.chat import ChatCompletion

    choices = [
        {"index": i, "finish_reason": reason, "logprobs": None, "message": {"role": "assistant", "content": text}}
        for i, (text, reason) in enumerate(_paired(resp, n, finish_reason))
    ]
    return ChatCompletion.model_validate(_test_answer("chat.completion", choices))


def create_completion(
    resp: str | list[str], n: int = 1, finish_reason: FinishReason | list[FinishReason] = "stop"
) -> Completion:
    """A text answer with these texts; one text is repeated n times."""
    from openai.types import Completion

    choices = [
        {"index": i, "finish_reason": reason, "logprobs": None, "text": text}
        for i, (text, reason) in enumerate(_paired(resp, n, finish_reason))
    ]
    return Completion.model_validate(_test_answer("text_completion", choices))


def _paired(resp: str | list[str], n: int, finish_reason: str | list[Any]) -> list[tuple[str, str]]:
    texts = [resp] * n if isinstance(resp, str) else resp
    reasons = [finish_reason] * len(texts) if isinstance(finish_reason, str) else finish_reason
    return list(zip(texts, reasons, strict=True))


def _test_answer(kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": "test_id", "object": kind, "created": 0, "model": "test_model", "choices": choices}
