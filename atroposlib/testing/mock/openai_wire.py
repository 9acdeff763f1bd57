"""OpenAI's bodies: chat completions and completions, as vLLM answers them."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from typing import Any

from atroposlib.testing.mock.codec import Codec
from atroposlib.testing.mock.generation import Choice, Generation, prompt_logprobs

_TOOL_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.S)


def chat_generation(body: dict[str, Any], codec: Codec) -> Generation:
    """Read a chat request."""
    return Generation(
        prompt_ids=codec.render(body["messages"], body.get("tools")),
        messages=body["messages"],
        max_tokens=body.get("max_completion_tokens") or body.get("max_tokens"),
        **_shared(body),
    )


def text_generations(body: dict[str, Any], codec: Codec) -> list[Generation]:
    """Read a completion request: a text, ids, or several of either."""
    prompt = body["prompt"]
    prompts = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
    # vLLM's default; without it a text would be as long as the model allows.
    max_tokens = body.get("max_tokens") or 16
    return [
        Generation(
            prompt_ids=codec.encode(one) if isinstance(one, str) else list(one), max_tokens=max_tokens, **_shared(body)
        )
        for one in prompts
    ]


def _shared(body: dict[str, Any]) -> dict[str, Any]:
    stop = body.get("stop") or ()
    return {
        "n": body.get("n") or 1,
        "seed": body.get("seed"),
        "is_greedy": body.get("temperature") == 0,
        "stop": (stop,) if isinstance(stop, str) else tuple(stop),
    }


def chat_answer(body: dict[str, Any], asked: Generation, choices: Sequence[Choice], codec: Codec) -> dict[str, Any]:
    """The chat.completion object."""
    shown = []
    for choice in choices:
        message: dict[str, Any] = {"role": "assistant", "content": codec.decode(choice.token_ids)}
        reason = choice.finish_reason
        if body.get("tools") and (calls := tool_calls(message["content"])):
            message |= {"content": None, "tool_calls": calls}
            reason = "tool_calls" if reason == "stop" else reason
        entry = {"index": choice.index, "message": message, "finish_reason": reason}
        if body.get("logprobs"):
            entry["logprobs"] = {"content": [_logprob(codec, *pair) for pair in _pairs(choice)]}
        if body.get("return_token_ids"):
            entry["token_ids"] = choice.token_ids
        shown.append(entry)
    answer = _answer("chat.completion", body, shown, [asked], choices)
    if body.get("return_token_ids"):
        answer["prompt_token_ids"] = asked.prompt_ids
    return answer


def text_answer(
    body: dict[str, Any], asked: Sequence[Generation], sampled: Sequence[Sequence[Choice]], codec: Codec
) -> dict[str, Any]:
    """The text_completion object; the choices of several prompts one after the other."""
    shown: list[dict[str, Any]] = []
    for generation, choices in zip(asked, sampled, strict=True):
        for choice in choices:
            text = codec.decode(choice.token_ids)
            before = codec.decode(generation.prompt_ids) if body.get("echo") else ""
            entry = {"index": len(shown), "text": before + text, "finish_reason": choice.finish_reason}
            if body.get("logprobs") is not None:
                entry["logprobs"] = _text_logprobs(choice, codec)
            if body.get("prompt_logprobs") is not None:
                entry["prompt_logprobs"] = shown_prompt_logprobs(generation.prompt_ids, body["prompt_logprobs"], codec)
            if body.get("return_token_ids"):
                entry |= {"token_ids": choice.token_ids, "prompt_token_ids": generation.prompt_ids}
            shown.append(entry)
    return _answer("text_completion", body, shown, asked, [choice for choices in sampled for choice in choices])


def shown_prompt_logprobs(token_ids: list[int], top_k: int, codec: Codec) -> list[dict[str, Any] | None]:
    """vLLM's form: `{id: {logprob, rank, decoded_token}}` for each position but the first."""
    return [
        None
        if column is None
        else {
            str(token): {"logprob": logprob, "rank": rank, "decoded_token": codec.decode([token], keep_special=True)}
            for rank, (token, logprob) in enumerate(column.items(), 1)
        }
        for column in prompt_logprobs(token_ids, top_k, codec.vocab_size)
    ]


def tool_calls(text: str) -> list[dict[str, Any]]:
    """The calls that a text spells out as Hermes models do; none when one of them is no JSON."""
    try:
        calls = [json.loads(found) for found in _TOOL_CALL.findall(text)]
        return [
            {
                "id": f"call-{position}",
                "type": "function",
                "function": {"name": call["name"], "arguments": json.dumps(call.get("arguments", {}))},
            }
            for position, call in enumerate(calls)
        ]
    except (ValueError, KeyError, TypeError):
        return []


def _answer(
    kind: str, body: dict[str, Any], shown: list[dict[str, Any]], asked: Sequence[Generation], choices: Sequence[Choice]
) -> dict[str, Any]:
    prompt_tokens = sum(len(generation.prompt_ids) for generation in asked)
    completion_tokens = sum(len(choice.token_ids) for choice in choices)
    return {
        "id": "mock",
        "object": kind,
        "created": int(time.time()),
        "model": body.get("model", "mock"),
        "choices": shown,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


def _pairs(choice: Choice) -> list[tuple[int, float]]:
    # Not strict: the fault misalign makes them differ.
    return list(zip(choice.token_ids, choice.logprobs, strict=False))


def _logprob(codec: Codec, token: int, logprob: float) -> dict[str, Any]:
    text = codec.decode([token], keep_special=True)
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}


def _text_logprobs(choice: Choice, codec: Codec) -> dict[str, Any]:
    texts = [codec.decode([token], keep_special=True) for token in choice.token_ids]
    offsets = [0]
    for text in texts[:-1]:
        offsets.append(offsets[-1] + len(text))
    return {"tokens": texts, "token_logprobs": choice.logprobs, "top_logprobs": None, "text_offset": offsets}
