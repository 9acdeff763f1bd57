"""What the mock inference server answers on the routes of each engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from atroposlib.testing.mock.codec import ByteCodec
from atroposlib.testing.mock_inference import MockInferenceServer

CODEC = ByteCodec()
CHAT = [{"role": "user", "content": "what?"}]


@pytest.fixture
async def server() -> AsyncIterator[MockInferenceServer]:
    async with MockInferenceServer("that", weight_version="3") as running:
        yield running


@pytest.fixture
async def http(server: MockInferenceServer) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=server.root_url, timeout=5) as client:
        yield client


async def post(http: httpx.AsyncClient, path: str, **body: Any) -> Any:
    answer = await http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_openai_chat(http: httpx.AsyncClient) -> None:
    answer = await post(http, "/v1/chat/completions", model="m", messages=CHAT, n=2, logprobs=True)

    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "that"}
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert [entry["token"] for entry in answer["choices"][0]["logprobs"]["content"]] == [*"that", "<|im_end|>"]
    assert answer["usage"]["completion_tokens"] == 10
    assert answer["usage"]["prompt_tokens"] == len(CODEC.render(CHAT))


async def test_openai_chat_reads_tool_calls_out_of_the_text(
    server: MockInferenceServer, http: httpx.AsyncClient
) -> None:
    from atroposlib.testing.mock.policies import as_policy

    server.policy = as_policy('<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>')
    answer = await post(http, "/v1/chat/completions", messages=CHAT, tools=[{"type": "function"}])
    untouched = await post(http, "/v1/chat/completions", messages=CHAT)

    [choice] = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 1}'}
    assert untouched["choices"][0]["message"]["content"].startswith("<tool_call>")


async def test_openai_completions_of_texts_and_of_ids(http: httpx.AsyncClient) -> None:
    texts = await post(http, "/v1/completions", prompt=["a", "b"], n=2, logprobs=1)
    ids = await post(http, "/v1/completions", prompt=[5, 6], max_tokens=2, prompt_logprobs=2, return_token_ids=True)

    assert [choice["text"] for choice in texts["choices"]] == ["that"] * 4
    assert [choice["index"] for choice in texts["choices"]] == [0, 1, 2, 3]
    assert texts["choices"][0]["logprobs"]["text_offset"] == [0, 1, 2, 3, 4]
    [choice] = ids["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("th", "length")
    assert choice["prompt_token_ids"] == [5, 6]
    assert choice["prompt_logprobs"][0] is None
    assert list(choice["prompt_logprobs"][1]) == ["6", "7"]


async def test_vllm_token_route_gives_ids_logprobs_and_versions(http: httpx.AsyncClient) -> None:
    answer = await post(
        http, "/inference/v1/generate", token_ids=[5], model="m", sampling_params={"n": 2, "prompt_logprobs": 1}
    )

    first = min(answer["choices"], key=lambda choice: choice["index"])
    assert first["token_ids"] == [*CODEC.encode("that"), 2]
    assert first["weight_versions"] == [{"version": "3", "start": 0, "end": 5}]
    assert [entry["token_id"] for entry in first["logprobs"]["content"]] == first["token_ids"]
    assert answer["prompt_logprobs"] == [None]


async def test_upstreams_bundled_server(http: httpx.AsyncClient) -> None:
    answer = await post(
        http, "/generate", prompt={"prompt_token_ids": [5, 6]}, n=2, logprobs=0, max_tokens=2, prompt_logprobs=1
    )

    assert answer["prompt_token_ids"] == [5, 6]
    assert answer["text"] == ["th", "th"]
    assert answer["finish_reasons"] == ["length", "length"]
    t, h = CODEC.encode("th")
    assert answer["logprobs"][0] == [[{str(t): -0.25}], [{str(h): -0.5}]]
    assert answer["prompt_logprobs"][0] is None
    assert list(answer["prompt_logprobs"][1]) == ["6"]


async def test_sglang(http: httpx.AsyncClient) -> None:
    body = {"input_ids": [5, 6], "return_logprob": True}
    one = await post(http, "/generate", **body, sampling_params={"max_new_tokens": 2})
    several = await post(http, "/generate", **body, logprob_start_len=0, top_logprobs_num=2, sampling_params={"n": 2})

    t, h = CODEC.encode("th")
    assert one["meta_info"]["output_token_logprobs"] == [[-0.25, t, None], [-0.5, h, None]]
    assert one["meta_info"]["finish_reason"] == {"type": "length", "length": 2}
    assert one["meta_info"]["weight_version"] == "3"
    assert [choice["meta_info"]["finish_reason"]["type"] for choice in several] == ["stop", "stop"]
    assert several[0]["meta_info"]["input_token_logprobs"][0] == [None, 5, None]
    assert [token for _, token, _ in several[0]["meta_info"]["input_top_logprobs"][1]] == [6, 7]


async def test_trl(http: httpx.AsyncClient) -> None:
    answer = await post(http, "/generate/", prompts=["a", "b"], n=2, max_tokens=64)

    assert answer["completion_ids"] == [[*CODEC.encode("that"), 2]] * 4


async def test_health_models_and_load(server: MockInferenceServer, http: httpx.AsyncClient) -> None:
    await post(http, "/generate", prompt="a")

    assert (await http.get("/health")).status_code == 200
    assert (await http.get("/v1/models")).json()["data"][0]["id"] == "mock"
    metrics = (await http.get("/metrics")).text
    assert 'vllm:num_requests_running{model_name="mock"} 0' in metrics
    assert 'sglang:num_queue_reqs{model_name="mock"} 0' in metrics
    assert 'vllm:generation_tokens_total{model_name="mock"} 5' in metrics
    assert 'vllm:request_success_total{finished_reason="stop",model_name="mock"} 1' in metrics
    assert (await http.get("/mock/stats")).json()["routes"]["/generate"] == 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/mock/version", {"version": 4}),
        ("/update_weight_version", {"new_version": "4"}),
        ("/update_weights_from_disk", {"model_path": "m", "weight_version": "4"}),
    ],
)
async def test_weights_are_published_over_http(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
    answer = await post(http, path, **body)

    assert answer["success"] is True
    assert (await http.get("/weight_info")).json() == {"weight_version": "4"}
    assert (await http.get("/get_model_info")).json()["weight_version"] == "4"


@pytest.mark.parametrize(
    ("path", "content", "words"),
    [
        ("/generate", b"{", "no JSON"),
        ("/generate", b"{}", "cannot read the body"),
        ("/mock/version", b"{}", "which version"),
        ("/v1/chat/completions", b'{"messages": [], "stream": true}', "does not stream"),
    ],
)
async def test_a_bad_body_is_answered_400_with_the_reason(
    http: httpx.AsyncClient, path: str, content: bytes, words: str
) -> None:
    answer = await http.post(path, content=content)

    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


async def test_an_unknown_route_is_404(http: httpx.AsyncClient) -> None:
    assert (await http.get("/v2/models")).status_code == 404


async def test_stop_strings_and_limits_cut_the_reply(http: httpx.AsyncClient) -> None:
    stopped = await post(http, "/v1/completions", prompt="a", stop=["a"])
    cut = await post(http, "/v1/chat/completions", messages=CHAT, max_completion_tokens=3)

    assert (stopped["choices"][0]["text"], stopped["choices"][0]["finish_reason"]) == ("th", "stop")
    assert (cut["choices"][0]["message"]["content"], cut["choices"][0]["finish_reason"]) == ("tha", "length")
