"""The wire of the vLLM server that upstream's trainer bundled: `POST /generate`, no policy versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from atroposlib.envs.server_handling.engines.samples import TokenSamples, finish_reason_name, samples_from_lists
from atroposlib.errors import ConfigError

BUNDLED_GENERATE = "/generate"


def bundled_body(prompt_ids: list[int], sampling: Mapping[str, Any]) -> dict[str, Any]:
    """The request: sampling parameters stand beside the prompt."""
    # Older vLLM knows no 0 for "all tokens".
    top_k = {"top_k": -1} if sampling.get("top_k") == 0 else {}
    return {"prompt": {"prompt_token_ids": prompt_ids}, **sampling, **top_k}


def bundled_samples(prompt_ids: list[int], answer: Mapping[str, Any], *, server: str) -> TokenSamples:
    """Read an answer: token ids and logprobs come as one dictionary `{id: logprob}` a position.

    Raises:
        ConfigError: the server gives no logprobs, so its tokens cannot be trained on.
        KeyError, TypeError, ValueError: it has another shape.
    """
    if not answer.get("logprobs"):
        raise ConfigError(
            f"{server} answered {BUNDLED_GENERATE} without logprobs; start vLLM with --enable-scale-out instead"
        )
    token_ids = answer.get("token_ids") or [None] * len(answer["logprobs"])
    pairs = [
        [_sampled(position, ids[i] if ids else None) for i, position in enumerate(positions)]
        for ids, positions in zip(token_ids, answer["logprobs"], strict=True)
    ]
    return samples_from_lists(
        prompt_ids,
        [[token for token, _ in completion] for completion in pairs],
        [[logprob for _, logprob in completion] for completion in pairs],
        [finish_reason_name(reason) for reason in answer["finish_reasons"]],
    )


def _sampled(position: Any, token_id: int | None) -> tuple[int, float]:
    """The sampled token of one position and its logprob."""
    entries = position[0] if isinstance(position, list) else position
    key = str(token_id) if token_id is not None else next(iter(entries))
    value = entries[key]
    return int(key), float(value["logprob"] if isinstance(value, Mapping) else value)
