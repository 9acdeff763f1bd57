"""Sessions over real HTTP: the proxy and its client."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn

from atroposlib.envs.server_handling.managed_server_proxy import create_app, main, openai_error
from atroposlib.envs.server_handling.proxy.requests import ProxyConfig
from atroposlib.envs.server_handling.proxy.sessions import ProxySessions
from atroposlib.envs.server_handling.proxy_client import ProxyManagedServer, create_proxy_session
from atroposlib.envs.server_handling.server_baseline import APIServerConfig
from atroposlib.envs.server_handling.server_manager import ServerManager
from atroposlib.envs.server_handling.sessions.provenance import Origin, remember_origins, sequence_key
from atroposlib.errors import ConfigError, ModelServerError, RolloutError, UnknownSessionError
from atroposlib.testing.mock_inference import MockInferenceServer
from tests.envs.session_fakes import ScriptedServer

USER: Any = {"role": "user", "content": "1 + 1?"}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
URL = "http://one:9001/v1"


def scripted(tokenizer: Any, url: str) -> ScriptedServer:
    server = ScriptedServer(tokenizer, lambda prompt, index: CALL if "1 + 1" in prompt.split("user")[-1] else "ok")
    server.config = SimpleNamespace(model_name="m", tokenizer_name="none", base_url=url, server_type="vllm")
    return server


@pytest.fixture
def servers(tokenizer: Any) -> list[ScriptedServer]:
    return [scripted(tokenizer, URL), scripted(tokenizer, "http://two:9002/v1")]


class Server(uvicorn.Server):
    """Says when it listens."""

    def __init__(self, app: Any) -> None:
        super().__init__(uvicorn.Config(app, log_level="critical", ws="none"))
        self.listens = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listens.set()


@asynccontextmanager
async def serving(app: Any) -> AsyncIterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = Server(app)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(server.serve(sockets=[listener]))
            await server.listens.wait()
            try:
                yield f"http://127.0.0.1:{listener.getsockname()[1]}"
            finally:
                server.should_exit = True


@pytest.fixture
async def url(servers: list[ScriptedServer], tokenizer: Any) -> AsyncIterator[str]:
    async with serving(create_app(SimpleNamespace(servers=servers), tokenizer, "the-model")) as url:
        yield url


@pytest.fixture
async def http(url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url) as client:
        yield client


# The client


async def test_a_proxied_session_gives_tool_calls_and_nodes_after_each_call(url: str) -> None:
    async with await create_proxy_session(url) as session:
        first = await session.chat_completion(messages=[USER], tools=TOOLS)
        calls: Any = first.choices[0].message.tool_calls
        [before] = session.get_state()["nodes"]
        await session.chat_completion(
            messages=[USER, first.choices[0].message, {"role": "tool", "tool_call_id": calls[0]["id"], "content": "2"}],
            tools=TOOLS,
        )
        [after] = session.get_state()["nodes"]

    assert calls[0]["function"] == {"name": "add", "arguments": '{"a": 1}'}
    assert first.choices[0].finish_reason == "tool_calls"
    assert (first.model, session.model_name, session.base_url) == ("the-model", "the-model", URL)
    assert after.tokens[: len(before.tokens)] == before.tokens
    assert [version for version, _ in after.policy_versions] == [-1, 7, -1, 7]


async def test_every_sampling_option_reaches_the_engine(url: str, servers: list[ScriptedServer]) -> None:
    async with await create_proxy_session(url) as session:
        await session.chat_completion(
            messages=[USER], n=2, stop=["x"], top_p=0.5, top_k=3, seed=4, min_tokens=2, split="train", model="other"
        )
        assert len(session.get_state()["nodes"]) == 2

    sent = {name: value for name, value in servers[0].requests[0].items() if name not in ("input_ids", "prompt")}
    assert sent == {
        "n": 2, "stop": ["x"], "top_p": 0.5, "top_k": 3, "seed": 4, "min_tokens": 2, "temperature": 1.0,
    }  # fmt: skip


async def test_the_context_deletes_the_session(url: str, http: httpx.AsyncClient) -> None:
    async with await create_proxy_session(url) as session:
        assert (await http.get("/health")).json()["sessions"] == 1

    assert (await http.get("/health")).json()["sessions"] == 0
    with pytest.raises(RolloutError, match="there is no session"):
        await session.chat_completion(messages=[USER])
    await session.cleanup()


async def test_an_agent_with_an_openai_client_fills_the_session(url: str) -> None:
    from openai import AsyncOpenAI

    async with await create_proxy_session(url) as session:
        async with AsyncOpenAI(base_url=session.get_url(), api_key="none") as agent:
            answer = await agent.chat.completions.create(model="x", messages=[USER], tools=TOOLS)
        state = await session.fetch_state()

    calls: Any = answer.choices[0].message.tool_calls
    assert calls[0].function.name == "add"
    assert len(state["nodes"]) == 1


async def test_nodes_leave_their_origins_once_each(url: str) -> None:
    with remember_origins() as origins:
        async with await create_proxy_session(url) as session:
            await session.chat_completion(messages=[USER], n=2)
            await session.fetch_state()
            [node, same] = session.get_state()["nodes"]

    assert node.tokens == same.tokens
    assert origins == {sequence_key(node.tokens): [Origin(node.logprobs, node.policy_versions, "stop")] * 2}


@pytest.mark.parametrize("runs", [[(-1, 3)], [(7, 2), (-1, 1)], []])
async def test_sampled_tokens_without_a_version_are_refused_where_it_is_required(runs: list[tuple[int, int]]) -> None:
    node = {"full_text": "", "tokens": [1, 2, 3], "masked_tokens": [-100, 2, 3], "logprobs": [1.0, -0.5, -0.5]}

    async def request(*_: Any, **__: Any) -> Any:
        return {"nodes": [{**node, "policy_versions": runs}]}

    session = ProxyManagedServer("http://proxy", "uuid", require_version=True)
    session._request = request  # type: ignore[method-assign]
    for _ in range(2):
        with pytest.raises(ModelServerError, match="published policy version"):
            await session.fetch_state()

    runs[:] = [(-1, 1), (7, 2)]
    assert len((await session.fetch_state())["nodes"]) == 1


async def test_answers_that_cross_do_not_take_newer_nodes_away() -> None:
    session = ProxyManagedServer("http://proxy", "uuid")
    node = {"full_text": "", "tokens": [], "masked_tokens": [], "logprobs": []}
    old, new = asyncio.Event(), asyncio.Event()
    answers = iter([(old, {"nodes": []}), (new, {"nodes": [node]})])

    async def request(*_: Any, **__: Any) -> Any:
        event, answer = next(answers)
        await event.wait()
        return answer

    session._request = request  # type: ignore[method-assign]
    async with asyncio.TaskGroup() as tasks:
        first = tasks.create_task(session.fetch_state())
        await asyncio.sleep(0)
        second = tasks.create_task(session.fetch_state())
        await asyncio.sleep(0)
        new.set()
        await second
        old.set()
        await first

    assert len(session.get_state()["nodes"]) == 1


async def test_a_proxy_that_is_away_is_a_failed_server() -> None:
    with pytest.raises(ModelServerError, match="did not answer"):
        await create_proxy_session("http://127.0.0.1:1")
    with pytest.raises(ConfigError, match="not a URL"):
        await create_proxy_session("127.0.0.1:1")


async def test_a_failing_backend_is_a_failed_server(
    url: str, servers: list[ScriptedServer], http: httpx.AsyncClient
) -> None:
    def fail(prompt: str, index: int) -> str:
        raise ModelServerError("engine died")

    servers[0].script = fail
    async with await create_proxy_session(url) as session:
        with pytest.raises(ModelServerError, match="engine died"):
            await session.chat_completion(messages=[USER])
        assert session.get_state() == {"nodes": []}


async def test_completion_is_not_there() -> None:
    with pytest.raises(NotImplementedError, match="text completions"):
        await ProxyManagedServer("http://proxy", "uuid").completion(prompt="x")


# The routes


async def test_health_models_and_servers(http: httpx.AsyncClient) -> None:
    health, models, listed = [(await http.get(path)).json() for path in ("/health", "/v1/models", "/servers")]

    assert health == {"status": "ok", "model": "the-model", "sessions": 0, "servers": 2, "healthy_servers": 2}
    assert models["object"] == "list"
    assert (models["data"][0]["id"], models["data"][0]["owned_by"]) == ("the-model", "atropos")
    assert listed["servers"][1] == {
        "index": 1, "base_url": "http://two:9002/v1", "healthy": True, "model_name": "m", "server_type": "vllm",
    }  # fmt: skip


async def test_sessions_are_created_listed_and_deleted(http: httpx.AsyncClient) -> None:
    created = (await http.post("/sessions/create", json={"base_url": URL, "tool_parser": "mistral"})).json()
    await http.post(f"/{created['uuid']}/v1/chat/completions", json={"messages": [USER]})
    [listed] = (await http.get("/sessions")).json()["sessions"]
    deleted = (await http.delete(f"/{created['uuid']}")).json()

    assert created.keys() == {"uuid", "model_name", "tool_parser", "base_url", "created_at"}
    assert (created["base_url"], created["tool_parser"]) == (URL, "mistral")
    assert listed.keys() == {"uuid", "model_name", "base_url", "created_at", "last_accessed", "num_nodes"}
    assert (listed["num_nodes"], listed["last_accessed"] >= listed["created_at"]) == (1, True)
    assert deleted == {"status": "deleted", "uuid": created["uuid"]}
    assert (await http.get("/sessions")).json() == {"sessions": []}


async def test_new_sessions_spread_over_the_servers(http: httpx.AsyncClient) -> None:
    urls = [(await http.post("/sessions/create", json={})).json()["base_url"] for _ in range(4)]

    assert sorted(urls) == [URL, URL, "http://two:9002/v1", "http://two:9002/v1"]


async def test_render_shows_the_exact_prompt_and_keeps_nothing(
    http: httpx.AsyncClient, servers: list[ScriptedServer]
) -> None:
    session = (await http.post("/sessions/create", json={"base_url": URL})).json()["uuid"]

    rendered = (await http.post(f"/{session}/v1/chat/completions/render", json={"messages": [USER]})).json()
    before = (await http.get(f"/{session}/nodes")).json()
    answer = (await http.post(f"/{session}/v1/chat/completions", json={"messages": [USER]})).json()

    assert before == {"nodes": []}
    assert rendered["num_tokens"] == len(rendered["token_ids"])
    assert (rendered["prompt_text"], rendered["token_ids"]) == (
        servers[0].requests[0]["prompt"], servers[0].requests[0]["input_ids"],
    )  # fmt: skip
    assert "usage" not in answer


async def test_a_tracked_tree_lists_its_nodes_too(http: httpx.AsyncClient) -> None:
    session = (await http.post("/sessions/create", json={"track_tree": True})).json()["uuid"]

    await http.post(f"/{session}/v1/chat/completions", json={"messages": [USER], "n": 1})

    assert len((await http.get(f"/{session}/nodes")).json()["nodes"]) == 1


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("/sessions/create", {"base_url": "http://nowhere"}, 404, "no inference server has base_url"),
        ("/nobody/v1/chat/completions", {"messages": [USER]}, 404, "no session 'nobody'"),
        ("{session}/v1/chat/completions", {"messages": []}, 400, "messages is empty"),
        ("{session}/v1/chat/completions", {"messages": [USER], "stream": True}, 400, "stream is not supported"),
        ("{session}/v1/chat/completions", {}, 422, "messages"),
        ("/setup", {"model_name": "new", "servers": []}, 422, "servers"),
    ],
)
async def test_errors_have_the_form_of_openai(
    http: httpx.AsyncClient, path: str, body: Any, status: int, text: str
) -> None:
    session = (await http.post("/sessions/create", json={})).json()["uuid"]

    answer = await http.post(path.format(session=f"/{session}"), json=body)

    assert answer.status_code == status
    error = answer.json()["error"]
    assert text in error["message"]
    assert error["code"] == status
    assert error["type"] == "invalid_request_error"


async def test_setup_puts_other_servers_there(http: httpx.AsyncClient, tokenizer_name: str) -> None:
    await http.post("/sessions/create", json={})

    answer = await http.post(
        "/setup",
        json={"model_name": "new", "tokenizer_name": tokenizer_name, "servers": [{"base_url": "http://three:1/v1"}]},
    )

    assert answer.json() == {"status": "ok", "servers": 1, "model_name": "new"}
    assert [server["base_url"] for server in (await http.get("/servers")).json()["servers"]] == ["http://three:1/v1"]
    assert (await http.get("/health")).json()["sessions"] == 0


async def test_setup_that_cannot_work_changes_nothing(http: httpx.AsyncClient, tokenizer_name: str) -> None:
    answer = await http.post(
        "/setup", json={"model_name": "new", "tokenizer_name": tokenizer_name, "servers": [{"base_url": ""}]}
    )

    assert answer.status_code == 400
    assert "base_url" in answer.json()["error"]["message"]
    assert (await http.get("/health")).json()["model"] == "the-model"


def test_openai_error() -> None:
    answer = openai_error(418, "no coffee", "teapot")

    assert answer.status_code == 418
    assert json.loads(bytes(answer.body)) == {"error": {"message": "no coffee", "type": "teapot", "code": 418}}


# Expiry


def test_an_unused_session_expires_and_a_busy_one_does_not(tokenizer: Any, servers: list[ScriptedServer]) -> None:
    now = 0.0
    sessions = ProxySessions(idle_s=10, clock=lambda: now)
    manager = SimpleNamespace(servers=servers)
    options: dict[str, Any] = {"base_url": None, "tool_parser": None, "track_tree": False}
    idle, busy = (sessions.create(manager, tokenizer, **options) for _ in range(2))

    with sessions.use(busy.uuid):
        now = 11.0
        assert sessions.list() == [busy]
    now = 20.0
    assert sessions.list() == [busy]
    now = 22.0
    assert sessions.list() == []
    with pytest.raises(UnknownSessionError, match="unused for 10 s"), sessions.use(idle.uuid):
        pass


# The process


def test_the_old_configuration_file_is_read() -> None:
    config = ProxyConfig.model_validate({"model_name": "m", "servers": [{"base_url": URL, "timeout": 5}]})

    [server] = config.server_configs()
    assert (server.base_url, server.model_name, server.server_type, server.timeout) == (URL, "m", "vllm", 5)


def test_a_bad_configuration_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "proxy.json"
    path.write_text('{"model_name": "m"}')

    with pytest.raises(SystemExit) as exit_info:
        main(["--config", str(path)])

    assert exit_info.value.code == 2
    assert f"error: {path} is not a proxy configuration" in capsys.readouterr().err


async def test_an_environment_reaches_its_servers_through_the_proxy_unchanged(tokenizer: Any) -> None:
    def reply(prompt: Any, index: int) -> list[int]:
        return [*tokenizer.encode("ok"), 2]

    async with MockInferenceServer(reply, weight_version="7") as engine:
        behind = ServerManager([APIServerConfig(base_url=engine.url, server_type="vllm", timeout=10)])
        async with serving(create_app(behind, tokenizer, "the-model")) as url:
            manager = ServerManager(
                [APIServerConfig(base_url=engine.url, server_type="vllm")], proxy_url=url, use_proxy=True
            )
            async with manager.managed_server(tokenizer=tokenizer) as session:
                answer = await session.chat_completion(messages=[USER], max_tokens=8)
                [node] = session.get_state()["nodes"]
            await manager.close()
        await behind.close()

    assert answer.choices[0].message.content == "ok"
    assert tokenizer.decode(node.completion_ids) == "ok<|im_end|>"
    assert node.policy_versions[-1] == (7, 3)
