"""Logprobs of a prompt, in the shapes that engines give them, read into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from atroposlib.errors import PromptLogprobsError


def top_k_of(kwargs: dict[str, Any]) -> int:
    """Take the number of candidates for each position out of a request's arguments; at least 1."""
    top_k, top_logprobs = kwargs.pop("top_k", None), kwargs.pop("top_logprobs", None)
    return max(1, top_k or top_logprobs or 1)


def prompt_logprobs_answer(
    prompt_ids: Sequence[int], positions: Sequence[Sequence[tuple[int, float]]], *, server: str
) -> dict[str, Any]:
    """What get_logprobs returns.

    Args:
        positions: for each token of the prompt its candidates (token id, nats).
    Raises:
        PromptLogprobsError: there is not one entry for each token.
    """
    if len(positions) != len(prompt_ids):
        raise PromptLogprobsError(
            f"{server} gave prompt logprobs of {len(positions)} positions for a prompt of {len(prompt_ids)} tokens"
        )
    return {
        "prompt_tokens": list(prompt_ids),
        "prompt_topk_token_ids": [[token for token, _ in position] for position in positions],
        "prompt_topk_logprobs": [[logprob for _, logprob in position] for position in positions],
    }


def vllm_positions(content: Any, n_tokens: int, *, server: str) -> list[list[tuple[int, float]]]:
    """From vLLM's `prompt_logprobs`: for each position a dictionary id to logprob, a list of such, or null.

    Raises:
        PromptLogprobsError: it has another shape.
    """
    try:
        # One server wraps the list once more, for the one prompt of the request.
        if len(content) == 1 and isinstance(content[0], list) and len(content[0]) == n_tokens:
            content = content[0]
        return [_candidates(position) for position in content]
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise PromptLogprobsError(f"{server} gave prompt logprobs of an unknown shape: {str(content)[:300]}") from error


def _candidates(position: Any) -> list[tuple[int, float]]:
    if position is None:
        return []
    if isinstance(position, list):
        return [candidate for part in position for candidate in _candidates(part)]
    return [
        (int(token), float(value["logprob"] if isinstance(value, Mapping) else value))
        for token, value in position.items()
    ]


def sglang_positions(chosen: Sequence[Any], top: Sequence[Any] | None) -> list[list[tuple[int, float]]]:
    """From SGLang's input_token_logprobs and input_top_logprobs: entries (logprob, id, text); null at the start."""
    positions = []
    for index, (logprob, token, *_) in enumerate(chosen):
        own = [] if logprob is None else [(int(token), float(logprob))]
        others = (top[index] if top else None) or []
        positions.append(own + [(int(other), float(nats)) for nats, other, *_ in others if other != token])
    return positions
