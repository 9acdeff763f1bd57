"""vLLM's token route, the older wire of upstream's bundled server, and logprobs of prompts. The servers are FAKES."""

from __future__ import annotations

from typing import Any

import pytest

from atroposlib.envs.server_handling.engines.prompt_logprobs import vllm_positions
from atroposlib.envs.server_handling.server_baseline import APIServerConfig
from atroposlib.envs.server_handling.vllm_server import VLLMServer
from atroposlib.errors import ConfigError, ModelServerError, PromptLogprobsError
from tests.envs.engine_fakes import FakeEngine

NATIVE, BUNDLED, COMPLETIONS = "POST /inference/v1/generate", "POST /generate", "POST /v1/completions"


def server_of(engine: FakeEngine, **config: Any) -> VLLMServer:
    return VLLMServer(APIServerConfig(base_url=engine.url, server_type="vllm", model_name="m", timeout=5, **config))


def native(versions: Any = None) -> Any:
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "token_ids": [7, 2],
        "logprobs": {"content": [{"token_id": 7, "logprob": -0.1}, {"token_id": 2, "logprob": -0.2}]},
        "weight_versions": versions,
    }
    return 200, {"choices": [choice]}


def bundled(body: Any) -> Any:
    return 200, {
        "text": ["x"] * body["n"],
        "prompt_token_ids": body["prompt"]["prompt_token_ids"],
        "token_ids": [[7, 2]] * body["n"],
        "logprobs": [[[{"7": -0.1}], [{"2": -0.2}]]] * body["n"],
        "finish_reasons": ["stop", "length"][: body["n"]],
    }


async def test_a_server_without_the_token_route_is_spoken_to_in_the_older_wire_from_then_on() -> None:
    async with FakeEngine({BUNDLED: bundled}) as engine:
        server = server_of(engine, api_key="k")
        samples = await server.sample_tokens(input_ids=[1, 5], n=2, max_new_tokens=4, stop=None)
        await server.sample_tokens(input_ids=[1, 5])
        await server.close()

    assert samples.as_lists() == ([1, 5], [[7, 2]] * 2, [[-0.1, -0.2]] * 2, ["stop", "length"])
    assert samples.completions[0].versions == [(-1, 2)]
    assert [route for route, _ in engine.asked] == [NATIVE, BUNDLED, BUNDLED]
    assert engine.bodies(BUNDLED)[0] == {
        "prompt": {"prompt_token_ids": [1, 5]}, "logprobs": 0, "n": 2, "max_tokens": 4, "temperature": 1.0, "top_p": 1.0,
        "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
    }  # fmt: skip
    assert engine.headers[-1]["Authorization"] == "Bearer k"


async def test_a_server_that_failed_is_not_taken_for_another_kind() -> None:
    async with FakeEngine({NATIVE: lambda body: (502, ""), BUNDLED: bundled}) as engine:
        server = server_of(engine)
        with pytest.raises(ModelServerError, match="502"):
            await server.sample_tokens(input_ids=[1])
        del engine.routes[NATIVE]
        assert (await server.sample_tokens(input_ids=[1])).completions[0].token_ids == [7, 2]
        await server.close()


async def test_neither_route_names_the_one_that_ought_to_be_there() -> None:
    async with FakeEngine({}) as engine:
        server = server_of(engine)
        with pytest.raises(ConfigError, match=r"/inference/v1/generate answered 404.*--enable-scale-out.*'m'"):
            await server.sample_tokens(input_ids=[1])
        await server.close()


async def test_an_older_server_without_logprobs_cannot_be_trained_on() -> None:
    async with FakeEngine({BUNDLED: lambda body: (200, {"text": ["x"]})}) as engine:
        server = server_of(engine)
        with pytest.raises(ConfigError, match="without logprobs"):
            await server.sample_tokens(input_ids=[1])
        await server.close()


async def test_an_aborted_completion_of_the_older_wire_is_a_failure() -> None:
    def aborted(body: Any) -> Any:
        status, content = bundled(body)
        return status, {**content, "finish_reasons": ["abort"]}

    async with FakeEngine({BUNDLED: aborted}) as engine:
        server = server_of(engine)
        with pytest.raises(ModelServerError, match="aborted"):
            await server.sample_tokens(input_ids=[1])
        await server.close()


async def test_how_a_request_travels_is_no_sampling_parameter() -> None:
    async with FakeEngine({NATIVE: lambda body: native()}) as engine:
        server = server_of(engine)
        await server.sample_tokens(input_ids=[1], timeout=3, extra_body={"x": 1}, extra_headers={"y": "z"}, seed=4)
        await server.close()

    [body] = engine.bodies(NATIVE)
    assert body["sampling_params"]["seed"] == 4
    assert not body["sampling_params"].keys() & {"timeout", "extra_body", "extra_headers"}


async def test_an_answer_of_another_shape_is_a_failure_of_the_server() -> None:
    async with FakeEngine({NATIVE: lambda body: (200, {"choices": [{"index": 0}]})}) as engine:
        server = server_of(engine)
        with pytest.raises(ModelServerError, match="unreadable"):
            await server.sample_tokens(input_ids=[1])
        await server.close()


async def test_versions_are_the_engines_and_silence_is_left_to_the_caller() -> None:
    spans: Any = [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 2}]
    async with FakeEngine({NATIVE: lambda body: native(spans)}) as engine:
        server = server_of(engine)
        server.require_version = True
        assert (await server.sample_tokens(input_ids=[1])).completions[0].versions == [(3, 1), (4, 1)]

        engine.routes[NATIVE] = lambda body: native(None)
        assert (await server.sample_tokens(input_ids=[1])).completions[0].versions == [(-1, 2)]

        engine.routes[NATIVE] = lambda body: native([{"version": "default", "start": 0, "end": 2}])
        with pytest.raises(ModelServerError, match="published"):
            await server.sample_tokens(input_ids=[1])
        await server.close()


async def test_the_current_version() -> None:
    async with FakeEngine({"GET /weight_info": lambda body: (200, {"weight_version": "12"})}) as engine:
        server = server_of(engine)
        assert await server.current_version() == 12
        engine.routes["GET /weight_info"] = lambda body: (200, {"weight_version": "default"})
        assert await server.current_version() is None
        del engine.routes["GET /weight_info"]
        assert await server.current_version() is None
        await server.close()


async def test_a_text_prompt_is_tokenised_with_one_bos() -> None:
    class Tokenizer:
        bos_token_id = 1

        def encode(self, text: str) -> list[int]:
            return [1, 1, *text.encode()]

        def apply_chat_template(self, messages: Any, **options: Any) -> str:
            return "".join(message["content"] for message in messages)

    async with FakeEngine({NATIVE: lambda body: native()}) as engine:
        server = server_of(engine)
        server.tokenizer = Tokenizer()
        await server.sample_tokens(prompt="ab")
        await server.sample_tokens(messages=[{"role": "user", "content": "c"}])
        await server.sample_tokens(prompt="ignored", input_ids=[1, 1, 9])
        with pytest.raises(ValueError, match="input_ids"):
            await server.sample_tokens(n=1)
        await server.close()

    assert [body["token_ids"] for body in engine.bodies(NATIVE)] == [[1, 97, 98], [1, 99], [1, 1, 9]]


POSITIONS = [None, {"5": {"logprob": -0.5, "rank": 1}, "8": {"logprob": -2.0, "rank": 2}}]
EXPECTED = {"prompt_tokens": [1, 5], "prompt_topk_token_ids": [[], [5, 8]], "prompt_topk_logprobs": [[], [-0.5, -2.0]]}


@pytest.mark.parametrize(
    ("route", "answer"),
    [
        (NATIVE, {"choices": [], "prompt_logprobs": POSITIONS}),
        (BUNDLED, {"text": ["x"], "prompt_logprobs": POSITIONS}),
        (COMPLETIONS, {"choices": [{"text": "x", "prompt_logprobs": POSITIONS}]}),
    ],
)
async def test_logprobs_of_a_prompt_from_whichever_route_is_there(route: str, answer: Any) -> None:
    async with FakeEngine({route: lambda body: (200, answer)}) as engine:
        server = server_of(engine)
        assert await server.get_logprobs(input_ids=[1, 5], top_k=2, split="train") == EXPECTED
        asked_before = len(engine.asked)
        await server.get_logprobs(input_ids=[1, 5], top_logprobs=0)
        await server.close()

    assert len(engine.asked) == asked_before + 1, "the route is remembered"
    first, second = ({**body, **body.get("sampling_params", {})} for body in engine.bodies(route))
    assert (first["prompt_logprobs"], second["prompt_logprobs"]) == (2, 1)
    assert (first["n"], first["temperature"], first["top_p"], first["max_tokens"]) == (1, 0.0, 1.0, 1)


async def test_no_logprobs_in_the_answer_is_an_error_that_upstream_code_catches_as_value_error() -> None:
    async with FakeEngine({BUNDLED: lambda body: (200, {"text": ["x"]})}) as engine:
        server = server_of(engine)
        with pytest.raises(ValueError, match="without prompt_logprobs"):
            await server.get_logprobs(input_ids=[1])
        await server.close()


@pytest.mark.parametrize(
    "content",
    [
        [None, {"5": -0.5, "8": -2.0}],
        [None, [{"5": -0.5}, {"8": -2.0}]],
        [[None, {"5": -0.5, "8": -2.0}]],
        [[None, [{"5": -0.5}, {"8": {"logprob": -2.0}}]]],
        [[], {"5": -0.5, "8": -2.0}],
    ],
)
def test_every_known_shape_of_prompt_logprobs(content: Any) -> None:
    assert vllm_positions(content, 2, server="s") == [[], [(5, -0.5), (8, -2.0)]]


@pytest.mark.parametrize("content", [5, ["x"], [{"a": -1.0}], [{"5": {}}]])
def test_an_unknown_shape_is_named(content: Any) -> None:
    with pytest.raises(PromptLogprobsError, match="unknown shape"):
        vllm_positions(content, 1, server="s")


async def test_positions_missing_from_the_answer_are_an_error() -> None:
    async with FakeEngine({NATIVE: lambda body: (200, {"prompt_logprobs": [None]})}) as engine:
        server = server_of(engine)
        with pytest.raises(PromptLogprobsError, match="1 positions for a prompt of 2 tokens"):
            await server.get_logprobs(input_ids=[1, 5])
        await server.close()


async def test_the_prefix_cache_is_not_shared_between_policies() -> None:
    versions = iter(["default", "7", "8", "8"])
    async with FakeEngine({NATIVE: lambda body: native([{"version": next(versions), "start": 0, "end": 2}])}) as engine:
        server = server_of(engine)
        for _ in range(4):
            await server.sample_tokens(input_ids=[1])
        await server.close()

    assert [body.get("cache_salt") for body in engine.bodies(NATIVE)] == [None, None, "policy-7", "policy-8"]
