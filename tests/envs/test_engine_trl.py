"""TRL's server, which knows prompts and ids but no chats. The server is a FAKE."""

from __future__ import annotations

from typing import Any

import pytest

from atroposlib.envs.server_handling.server_baseline import APIServerConfig
from atroposlib.envs.server_handling.trl_vllm_server import TrlVllmServer, sampled_logprobs
from atroposlib.errors import ModelServerError
from tests.envs.engine_fakes import FakeEngine

GENERATE = "POST /generate/"


def server_of(engine: FakeEngine, tokenizer: Any) -> TrlVllmServer:
    url = engine.url.removesuffix("/v1")
    server = TrlVllmServer(APIServerConfig(base_url=url, server_type="trl", model_name="m", timeout=5))
    server.tokenizer = tokenizer
    return server


async def test_a_chat_is_rendered_here_and_decoded_with_its_special_tokens(tokenizer: Any) -> None:
    eos = tokenizer.eos_token_id
    ids = [*tokenizer.encode("hi", add_special_tokens=False), eos]
    async with FakeEngine({GENERATE: lambda body: (200, {"completion_ids": [ids, ids[:1]]})}) as engine:
        server = server_of(engine, tokenizer)
        messages = [{"role": "user", "content": "hello"}]
        answer = await server.chat_completion(messages=messages, n=2, max_completion_tokens=9, stop=["x"])
        await server.close()

    assert [(choice.message.content, choice.finish_reason) for choice in answer.choices] == [
        (tokenizer.decode(ids), "stop"),
        (tokenizer.decode(ids[:1]), "length"),
    ]
    [body] = engine.bodies(GENERATE)
    [prompt] = body.pop("prompts")
    assert prompt == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert body == {
        "n": 2, "repetition_penalty": 1.0, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "max_tokens": 9,
        "generation_kwargs": {"stop": ["x"]},
    }  # fmt: skip


async def test_a_text_is_continued(tokenizer: Any) -> None:
    async with FakeEngine({GENERATE: lambda body: (200, {"completion_ids": [[97]]})}) as engine:
        server = server_of(engine, tokenizer)
        answer = await server.completion(prompt="p")
        await server.close()

    assert [(choice.text, choice.finish_reason) for choice in answer.choices] == [(tokenizer.decode([97]), "length")]
    assert engine.bodies(GENERATE)[0]["prompts"] == ["p"]
    assert engine.bodies(GENERATE)[0]["max_tokens"] == 1024


async def test_tokens_with_logprobs_from_a_server_that_gives_them(tokenizer: Any) -> None:
    answer = {"prompt_ids": [[1, 5]], "completion_ids": [[7, 8]], "logprobs": [[-0.1, -0.2]]}
    async with FakeEngine({GENERATE: lambda body: (200, answer)}) as engine:
        server = server_of(engine, tokenizer)
        samples = await server.sample_tokens(input_ids=[1, 5])
        await server.close()

    assert samples.as_lists() == ([1, 5], [[7, 8]], [[-0.1, -0.2]], ["length"])
    assert samples.completions[0].versions == [(-1, 2)]
    assert engine.bodies(GENERATE)[0]["prompts"] == [[1, 5]]
    assert engine.bodies(GENERATE)[0]["logprobs"] == 0


@pytest.mark.parametrize("answer", [(200, {"completion_ids": [[7]]}), (422, {"detail": "prompts: not a string"})])
async def test_a_server_without_logprobs_says_why_it_cannot_train(answer: Any, tokenizer: Any) -> None:
    async with FakeEngine({GENERATE: lambda body: answer}) as engine:
        server = server_of(engine, tokenizer)
        with pytest.raises(NotImplementedError, match=r"no logprobs.*vllm"):
            await server.tokens_and_logprobs_completion(input_ids=[1])
        await server.close()


async def test_a_server_that_is_down_is_no_server_without_logprobs(tokenizer: Any) -> None:
    async with FakeEngine({GENERATE: lambda body: (500, "boom")}) as engine:
        server = server_of(engine, tokenizer)
        with pytest.raises(ModelServerError, match="boom"):
            await server.sample_tokens(input_ids=[1])
        engine.routes[GENERATE] = lambda body: (200, {"text": "?"})
        with pytest.raises(ModelServerError, match="unreadable"):
            await server.completion(prompt="p")
        await server.close()


async def test_health_is_any_answer_below_500(tokenizer: Any) -> None:
    async with FakeEngine({}) as engine:
        server = server_of(engine, tokenizer)
        await server.check_health()
        engine.routes["GET /health/"] = lambda body: (500, "")
        with pytest.raises(ModelServerError, match="500"):
            await server.check_health()
        await server.close()


def test_the_sampled_tokens_logprob_is_found_among_candidates() -> None:
    assert sampled_logprobs([[7, 8]], [[[-0.1, -0.9], [-0.8, -0.2]]], [[[7, 1], [1, 8]]]) == [[-0.1, -0.2]]
    assert sampled_logprobs([[7]], [[[-0.1]]], None) == [[-0.1]]
    with pytest.raises(ModelServerError, match="token 7"):
        sampled_logprobs([[7]], [[None]], None)
    with pytest.raises(ModelServerError, match="token 7"):
        sampled_logprobs([[7]], [[[-0.1]]], [[[1]]])
