"""Chat and text over any OpenAI-compatible server."""

from __future__ import annotations

from typing import Any, cast

import pytest

from atroposlib.envs.server_handling.engines.engine_load import EngineLoad
from atroposlib.envs.server_handling.openai_server import OpenAIServer, request_body, resolve_openai_configs
from atroposlib.envs.server_handling.server_baseline import APIServerConfig, ReasoningConfig
from atroposlib.errors import ConfigError, ModelServerError, RolloutError
from tests.envs.engine_fakes import FakeEngine, Route, chat_answer

CHAT = "POST /v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hello"}]


def server_of(engine: FakeEngine, reasoning: ReasoningConfig | None = None, **config: Any) -> OpenAIServer:
    return OpenAIServer(APIServerConfig(base_url=engine.url, model_name="m", timeout=5, **config), reasoning)


async def chat(route: Route, **kwargs: Any) -> tuple[Any, FakeEngine]:
    async with FakeEngine({CHAT: route}) as engine:
        server = server_of(engine)
        try:
            return await server.chat_completion(messages=MESSAGES, **kwargs), engine
        finally:
            await server.close()


async def test_the_answer_is_the_packages_object_and_the_configs_model_wins() -> None:
    answer, engine = await chat(lambda body: (200, chat_answer("one", "two")), n=2, model="other", temperature=0.5)

    assert type(answer).__name__ == "ChatCompletion"
    assert [choice.message.content for choice in answer.choices] == ["one", "two"]
    assert engine.bodies(CHAT) == [{"messages": MESSAGES, "n": 2, "model": "m", "temperature": 0.5}]


async def test_fields_that_the_package_does_not_know_are_kept() -> None:
    content = chat_answer("one")
    content["choices"][0]["message"]["reasoning_content"] = "because"
    answer, _ = await chat(lambda body: (200, content))

    assert answer.choices[0].message.reasoning_content == "because"


async def test_an_answer_that_leaves_fields_out_is_an_answer() -> None:
    answer, _ = await chat(lambda body: (200, {"choices": [{"message": {"content": "one"}}]}))

    assert answer.choices[0].message.content == "one"


async def test_a_text_completion() -> None:
    content = {
        "id": "1",
        "object": "text_completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "text": "t"}],
    }
    async with FakeEngine({"POST /v1/completions": lambda body: (200, content)}) as engine:
        server = server_of(engine)
        answer = await server.completion(prompt="p", max_tokens=3)
        await server.close()

    assert answer.choices[0].text == "t"
    assert engine.bodies("POST /v1/completions") == [{"prompt": "p", "max_tokens": 3, "model": "m"}]


async def test_a_server_that_ignores_n_is_asked_once_for_each_choice_and_remembered() -> None:
    async with FakeEngine({CHAT: lambda body: (200, chat_answer("same"))}) as engine:
        server = server_of(engine)
        first = await server.chat_completion(messages=MESSAGES, n=3)
        second = await server.chat_completion(messages=MESSAGES, n=1)
        await server.close()

    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert server.config.n_kwarg_is_ignored
    assert [body["n"] for body in engine.bodies(CHAT)] == [3, 1, 1, 1], "and n=1 is asked for once"
    assert len(second.choices) == 1


async def test_the_packages_own_arguments_go_where_the_package_would_put_them() -> None:
    _, engine = await chat(
        lambda body: (200, chat_answer("a")), extra_body={"seed": 7}, extra_headers={"X-Title": "t"}, timeout=3
    )

    assert engine.bodies(CHAT) == [{"messages": MESSAGES, "model": "m", "seed": 7}]
    assert engine.headers[0]["X-Title"] == "t"


def test_arguments_that_were_not_given_stay_out_of_the_body() -> None:
    from openai import NOT_GIVEN

    assert request_body({"stop": NOT_GIVEN, "n": 1}) == {"n": 1}


async def test_streaming_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"server\.openai"):
        await chat(lambda body: (200, chat_answer("a")), stream=True)


@pytest.mark.parametrize(
    ("status", "content", "error", "text"),
    [
        (400, {"error": "too long"}, RolloutError, "too long"),
        (404, {"error": "no such model"}, ConfigError, "model_name 'm'"),
        (401, {"error": "bad key"}, ConfigError, "api_key"),
        (429, {}, ModelServerError, "429"),
        (200, {"error": "upstream is down"}, ModelServerError, "upstream is down"),
    ],
)
async def test_refusals_name_the_cause(status: int, content: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text) as raised:
        await chat(lambda body: (status, content))
    assert type(raised.value) is error


async def test_a_refusal_is_no_failure_of_the_server_and_a_failure_is() -> None:
    async with FakeEngine({CHAT: lambda body: (400, {})}) as engine:
        server = server_of(engine)
        with pytest.raises(RolloutError):
            await server.chat_completion(messages=MESSAGES)
        assert (server.server_healthy, server.load.failures) == (True, 0)

        engine.routes[CHAT] = lambda body: (500, {})
        with pytest.raises(ModelServerError):
            await server.chat_completion(messages=MESSAGES)
        assert (server.server_healthy, server.load.failures) == (False, 1)
        await server.close()


async def test_health_is_asked_of_the_models_route_and_spends_no_completion() -> None:
    async with FakeEngine({"GET /v1/models": lambda body: (401, {})}) as engine:
        server = server_of(engine)
        await server.check_health()
        engine.routes["GET /v1/models"] = lambda body: (502, {})
        with pytest.raises(ModelServerError, match="502"):
            await server.check_health()
        await server.close()

    assert {route for route, _ in engine.asked} == {"GET /v1/models"}


async def test_load_comes_from_the_metrics_page_and_a_server_without_one_is_not_asked_again() -> None:
    page = "vllm:num_requests_running 3\nvllm:num_requests_waiting 2\nvllm:kv_cache_usage_perc 0.5\n"
    async with FakeEngine({"GET /metrics": lambda body: (200, page)}) as engine:
        server = server_of(engine)
        assert await server.engine_load() == EngineLoad(running=3, waiting=2, kv_cache_usage=0.5)
        engine.routes["GET /metrics"] = lambda body: (503, "")
        with pytest.raises(ModelServerError, match="/metrics answered 503"):
            await server.engine_load()
        engine.routes["GET /metrics"] = lambda body: (200, "process_cpu_seconds_total 5")
        assert await server.engine_load() is None
        del engine.routes["GET /metrics"]
        assert await server.engine_load() is None
        assert await server.engine_load() is None
        await server.close()

    assert len(engine.asked) == 4


async def test_reasoning_is_asked_for_in_chat_alone() -> None:
    text = {"id": "1", "object": "text_completion", "created": 1, "model": "m", "choices": [{"index": 0, "text": "t"}]}
    async with FakeEngine(
        {CHAT: lambda body: (200, chat_answer("a")), "POST /v1/completions": lambda body: (200, text)}
    ) as engine:
        server = server_of(engine, ReasoningConfig(effort="low"))
        await server.chat_completion(messages=MESSAGES)
        await server.chat_completion(messages=MESSAGES, skip_reasoning=True)
        await server.completion(prompt="p")
        await server.close()

    asked, skipped = engine.bodies(CHAT)
    assert asked["reasoning"] == {"enabled": True, "effort": "low"}
    assert skipped == {"messages": MESSAGES, "model": "m"}
    assert "reasoning" not in engine.bodies("POST /v1/completions")[0]


async def test_the_packages_client_is_there_for_who_wants_it() -> None:
    async with FakeEngine({CHAT: lambda body: (200, chat_answer("a"))}) as engine:
        server = server_of(engine)
        answer = await server.openai.chat.completions.create(messages=[{"role": "user", "content": "x"}], model="z")
        await server.close()

    assert answer.choices[0].message.content == "a"
    assert engine.bodies(CHAT)[0]["model"] == "z"


def test_no_url_is_a_mistake_and_null_means_openai(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    with pytest.raises(ConfigError, match="base_url"):
        OpenAIServer(APIServerConfig())

    server = OpenAIServer(APIServerConfig(base_url=None, api_key=None))

    assert (server.api_url, server._api_key) == ("https://api.openai.com/v1", "k")


def test_openai_flags_and_file_change_the_default_servers() -> None:
    default = [APIServerConfig(base_url="http://a/v1", model_name="a")]

    servers = resolve_openai_configs(
        default, None, {"openai": {"model_name": "file", "timeout": 7}}, {"openai.model_name": "flag", "env.x": 1}
    )
    [server] = cast("list[APIServerConfig]", servers)

    assert (server.base_url, server.model_name, server.timeout) == ("http://a/v1", "flag", 7)
