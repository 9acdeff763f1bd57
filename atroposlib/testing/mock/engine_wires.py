"""The engines' own bodies: vLLM's token route, upstream's bundled vLLM server, SGLang, TRL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from atroposlib.testing.mock.codec import Codec
from atroposlib.testing.mock.generation import Choice, Generation, prompt_logprobs
from atroposlib.testing.mock.openai_wire import shown_prompt_logprobs


def vllm_generation(body: dict[str, Any], codec: Codec) -> Generation:
    """POST /inference/v1/generate: `{token_ids, sampling_params}`."""
    return _generation(body["token_ids"], body["sampling_params"])


def vllm_answer(
    body: dict[str, Any], asked: Generation, choices: Sequence[Choice], codec: Codec, version: str
) -> dict[str, Any]:
    """Choices in any order, each with the weight versions of its tokens."""
    top_k = body["sampling_params"].get("prompt_logprobs")
    answer: dict[str, Any] = {
        "request_id": "mock",
        "choices": [
            {
                "index": choice.index,
                "finish_reason": choice.finish_reason,
                "token_ids": choice.token_ids,
                "weight_versions": choice.spans,
                "logprobs": {
                    "content": [
                        {"token_id": token, "logprob": logprob}
                        for token, logprob in zip(choice.token_ids, choice.logprobs, strict=False)
                    ]
                },
            }
            for choice in reversed(choices)
        ],
    }
    if top_k is not None:
        answer["prompt_logprobs"] = shown_prompt_logprobs(asked.prompt_ids, top_k, codec)
    return answer


def bundled_generation(body: dict[str, Any], codec: Codec) -> Generation:
    """POST /generate of upstream's server: `{prompt: text or {prompt_token_ids}, n, ...}`."""
    prompt = body["prompt"]
    ids = codec.encode(prompt) if isinstance(prompt, str) else prompt["prompt_token_ids"]
    return _generation(ids, body)


def bundled_answer(
    body: dict[str, Any], asked: Generation, choices: Sequence[Choice], codec: Codec, version: str
) -> dict[str, Any]:
    """Lists by choice; a logprob is `[{id: nats}]`, one a token."""
    answer: dict[str, Any] = {
        "text": [codec.decode(choice.token_ids) for choice in choices],
        "prompt": codec.decode(asked.prompt_ids, keep_special=True),
        "prompt_token_ids": asked.prompt_ids,
        "token_ids": [choice.token_ids for choice in choices],
        "finish_reasons": [choice.finish_reason for choice in choices],
        "weight_version": version,
    }
    if body.get("logprobs") is not None:
        answer["logprobs"] = [
            [
                [{str(token): logprob}]
                for token, logprob in zip(choice.token_ids, choice.logprobs, strict=False)
            ]
            for choice in choices
        ]  # fmt: skip
    if body.get("prompt_logprobs") is not None:
        answer["prompt_logprobs"] = [
            column and {str(token): logprob for token, logprob in column.items()}
            for column in prompt_logprobs(asked.prompt_ids, body["prompt_logprobs"], codec.vocab_size)
        ]
    return answer


def sglang_generation(body: dict[str, Any], codec: Codec) -> Generation:
    """POST /generate of SGLang: `{input_ids or text, sampling_params}`; one prompt a request."""
    ids = body["input_ids"] if body.get("input_ids") is not None else codec.encode(body["text"])
    params = body.get("sampling_params") or {}
    # SGLang's default.
    return _generation(ids, {**params, "max_tokens": params.get("max_new_tokens", 128)})


def sglang_answer(
    body: dict[str, Any], asked: Generation, choices: Sequence[Choice], codec: Codec, version: str
) -> Any:
    """An object, or a list of them when n is above 1."""
    shown = [_sglang_choice(body, asked, choice, codec, version) for choice in choices]
    return shown if asked.n > 1 else shown[0]


def _sglang_choice(
    body: dict[str, Any], asked: Generation, choice: Choice, codec: Codec, version: str
) -> dict[str, Any]:
    reason: dict[str, Any] = {"type": choice.finish_reason}
    if choice.finish_reason == "stop":
        reason["matched"] = codec.eos_id
    elif choice.finish_reason == "length":
        reason["length"] = len(choice.token_ids)
    meta: dict[str, Any] = {
        "id": f"mock-{choice.index}",
        "finish_reason": reason,
        "prompt_tokens": len(asked.prompt_ids),
        "completion_tokens": len(choice.token_ids),
        "cached_tokens": 0,
        # The newest: SGLang names one version a request.
        "weight_version": choice.spans[-1]["version"] if choice.spans else version,
    }
    if body.get("return_logprob"):
        pairs = zip(choice.logprobs, choice.token_ids, strict=False)
        meta["output_token_logprobs"] = [[logprob, token, None] for logprob, token in pairs]
        if body.get("logprob_start_len", -1) >= 0:
            meta |= _sglang_prompt(asked.prompt_ids, body, codec)
    return {"text": codec.decode(choice.token_ids), "output_ids": choice.token_ids, "meta_info": meta}


def _sglang_prompt(token_ids: list[int], body: dict[str, Any], codec: Codec) -> dict[str, Any]:
    start = body["logprob_start_len"]
    columns = prompt_logprobs(token_ids, body.get("top_logprobs_num") or 1, codec.vocab_size)
    own = [[column and column[token], token, None] for token, column in zip(token_ids, columns, strict=True)]
    shown: dict[str, Any] = {"input_token_logprobs": own[start:]}
    if body.get("top_logprobs_num"):
        shown["input_top_logprobs"] = [
            column and [[logprob, token, None] for token, logprob in column.items()] for column in columns[start:]
        ]
    return shown


def trl_generations(body: dict[str, Any], codec: Codec) -> list[Generation]:
    """POST /generate/ of `trl vllm-serve`: `{prompts: [text or ids], n, max_tokens, ...}`."""
    prompts = [codec.encode(prompt) if isinstance(prompt, str) else prompt for prompt in body["prompts"]]
    return [_generation(prompt, {"max_tokens": 16, **body}) for prompt in prompts]


def trl_answer(asked: Sequence[Generation], sampled: Sequence[Sequence[Choice]]) -> dict[str, Any]:
    """Flat lists: the n choices of the first prompt, then those of the next."""
    choices = [choice for several in sampled for choice in several]
    return {
        "prompt_ids": [generation.prompt_ids for generation in asked],
        "completion_ids": [choice.token_ids for choice in choices],
        "logprobs": [choice.logprobs for choice in choices],
    }


def _generation(token_ids: list[int], params: dict[str, Any]) -> Generation:
    stop = params.get("stop") or ()
    return Generation(
        prompt_ids=list(token_ids),
        n=params.get("n") or 1,
        max_tokens=params.get("max_tokens"),
        is_greedy=params.get("temperature") == 0,
        seed=params.get("seed"),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
    )
