"""Asks a server for tokens: ours with their policy versions, or any object with upstream's token method."""

from __future__ import annotations

from typing import Any, Protocol

from atroposlib.envs.server_handling.engines.samples import TokenSamples, samples_from_lists
from atroposlib.envs.server_handling.sessions.sequence_node import UNSAMPLED_LOGPROB
from atroposlib.errors import RolloutError

ALLOW_DUMMY = "ATROPOS_ALLOW_DUMMY_MANAGED_SERVER"


class TokenServer(Protocol):
    """What a session likes to find in a server; upstream's `tokens_and_logprobs_completion(**kwargs)` will do too."""

    async def sample_tokens(self, **kwargs: Any) -> TokenSamples:
        """Sample from `input_ids`; `prompt` is their text."""
        ...


async def sample_tokens(server: Any, *, prompt: str, input_ids: list[int], **sampling: Any) -> TokenSamples:
    """Sample from `input_ids`; policy versions are unknown where the server has only upstream's method.

    Args:
        prompt: the text of input_ids, for servers that want text.
    Raises:
        NotImplementedError: the server does not return token ids.
        RolloutError: the server has no answer to this prompt.
    """
    try:
        if hasattr(server, "sample_tokens"):
            samples: TokenSamples | None = await server.sample_tokens(prompt=prompt, input_ids=input_ids, **sampling)
        elif hasattr(server, "tokens_and_logprobs_completion"):
            answer = await server.tokens_and_logprobs_completion(prompt=prompt, input_ids=input_ids, **sampling)
            samples = None if answer is None else _from_lists(*answer)
        else:
            raise NotImplementedError(f"{type(server).__name__} has no method sample_tokens")
    except NotImplementedError as error:
        raise NotImplementedError(
            f"a managed server needs the engine's token ids, and this server has none ({error}); use server_type vllm "
            f"or sglang for rollouts, or set {ALLOW_DUMMY}=1 for placeholder tokens that must not be trained on"
        ) from error
    if samples is None:
        raise RolloutError(f"{type(server).__name__} has no answer to the prompt {prompt[-200:]!r}")
    return samples


def _from_lists(prompt_ids: Any, outputs: Any, logprobs: Any, finish_reasons: Any) -> TokenSamples:
    """As samples_from_lists, but logprobs are made to fit: such servers leave some out."""
    fitted = [
        [*(nats or ())[: len(ids)], *[UNSAMPLED_LOGPROB] * (len(ids) - len(nats or ()))]
        for ids, nats in zip(outputs, logprobs, strict=True)
    ]
    return samples_from_lists(prompt_ids, outputs, fitted, finish_reasons)
