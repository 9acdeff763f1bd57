"""Which kind of session a manager gives, and on which server."""

from __future__ import annotations

import asyncio
import sys
from types import ModuleType
from typing import Any

import pytest

from atroposlib.envs.server_handling.managed_server import DummyManagedServer, ManagedServer
from atroposlib.envs.server_handling.server_baseline import APIServerConfig
from atroposlib.envs.server_handling.server_harness import create_chat_completion
from atroposlib.envs.server_handling.server_manager import ServerManager
from atroposlib.errors import ConfigError, ModelServerError
from tests.envs.fake_servers import TextServer, a_pool

MESSAGES = [{"role": "user", "content": "hi"}]


async def test_sessions_spread_over_the_servers_before_they_ask_anything(tokenizer: Any) -> None:
    manager, servers = a_pool("ab")

    async with (
        manager.managed_server(tokenizer=tokenizer) as one,
        manager.managed_server(tokenizer=tokenizer) as two,
    ):
        await one.completion(prompt="x")
        await one.completion(prompt="y")
        await two.completion(prompt="z")

    assert sorted(len(server.calls) for server in servers) == [1, 2]
    assert [seat.sessions for seat in manager._pool.seats] == [0, 0]
    await manager.close()


async def test_a_session_stays_on_its_server_and_survives_its_death(tokenizer: Any) -> None:
    manager, (one, two) = a_pool("ab")

    async with manager.managed_server(tokenizer=tokenizer) as session:
        for _ in range(3):
            await session.completion(prompt="x")
        assert (len(one.calls), len(two.calls)) == (3, 0)
        one.is_down = True
        await session.completion(prompt="x")

    assert len(two.calls) == 1
    await manager.close()


async def test_a_session_opens_while_every_server_is_down(tokenizer: Any) -> None:
    manager, [server] = a_pool("a")
    server.is_down = True
    server.config.timeout = 0.3
    with pytest.raises(ModelServerError):
        await manager.completion(prompt="x")
    server.is_down = False
    server.config.timeout = 10

    async with manager.managed_server(tokenizer=tokenizer) as session:
        await session.completion(prompt="x")
    await manager.close()


async def test_the_split_of_a_session_reaches_the_server(tokenizer: Any) -> None:
    manager, [server] = a_pool("a")
    server.open.clear()
    async with manager.managed_server(tokenizer=tokenizer) as session:
        task = asyncio.create_task(session.completion(prompt="x", split="eval"))
        async with asyncio.timeout(5):
            while not server.calls:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        assert server.load.eval_in_flight == 1
        server.open.set()
        await task
    await manager.close()


async def test_the_tool_parser_is_read_at_each_call(tokenizer: Any) -> None:
    manager, _ = a_pool("a")
    async with manager.managed_server(tokenizer=tokenizer) as plain:
        assert plain._tool_parser_name is None
    manager.tool_parser = "hermes"
    async with manager.managed_server(tokenizer=tokenizer) as with_tools:
        assert with_tools._tool_parser_name == "hermes"
    await manager.close()


async def test_without_token_ids_the_error_names_the_way_out_and_the_variable(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    manager, _ = a_pool("a", cls=TextServer)
    monkeypatch.delenv("ATROPOS_ALLOW_DUMMY_MANAGED_SERVER", raising=False)
    with pytest.raises(NotImplementedError, match=r"server_type vllm.*ATROPOS_ALLOW_DUMMY_MANAGED_SERVER"):
        async with manager.managed_server(tokenizer=tokenizer):
            pass

    monkeypatch.setenv("ATROPOS_ALLOW_DUMMY_MANAGED_SERVER", "Yes")
    async with manager.managed_server(tokenizer=tokenizer) as session:
        assert isinstance(session, DummyManagedServer)
        await session.chat_completion(messages=MESSAGES)
        assert session.get_state()["nodes"][0].metadata["dummy_tokens"] is True
    await manager.close()


async def test_with_a_mix_of_servers_sessions_go_where_token_ids_are(tokenizer: Any) -> None:
    manager, servers = a_pool("ab")
    manager.servers[0] = TextServer(servers[0].config)

    async with manager.managed_server(tokenizer=tokenizer) as session:
        assert isinstance(session, ManagedServer)
        assert session.server.config.base_url == "http://b/v1"
    await manager.close()


async def test_after_all_have_left_a_server_without_token_ids_is_an_outage_not_a_mistake(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    monkeypatch.delenv("ATROPOS_ALLOW_DUMMY_MANAGED_SERVER", raising=False)
    manager, _ = a_pool("a")
    await manager.sync_servers([])

    async def open_session() -> None:
        async with manager.managed_server(tokenizer=tokenizer):
            pass

    waiting = asyncio.create_task(open_session())
    await asyncio.sleep(0)
    manager._server_class = TextServer
    await manager.sync_servers(["http://b/v1"])
    with pytest.raises(ModelServerError, match="none that joined returns token ids"):
        await waiting
    await manager.close()


async def test_a_server_that_joins_and_leaves_at_once_is_an_outage(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    manager, _ = a_pool("a")
    await manager.sync_servers([])

    async def come_and_go(is_training: bool) -> None:
        """The server is gone again before the session opens."""

    monkeypatch.setattr(manager, "wait_for_sem", come_and_go)
    with pytest.raises(ModelServerError, match="all have left"):
        async with manager.managed_server(tokenizer=tokenizer):
            pass
    with pytest.raises(ModelServerError, match="all have left"):
        async with manager.dedicated_server():
            pass
    await manager.close()


class ProxySession:
    def __init__(self, url: str, **options: Any) -> None:
        self.url, self.options, self.is_open = url, options, False

    async def __aenter__(self) -> ProxySession:
        self.is_open = True
        return self

    async def __aexit__(self, *_: object) -> None:
        self.is_open = False


async def test_with_a_proxy_sessions_live_there(monkeypatch: pytest.MonkeyPatch) -> None:
    async def create_proxy_session(proxy_url: str, **options: Any) -> ProxySession:
        return ProxySession(proxy_url, **options)

    client: Any = ModuleType("proxy_client")
    client.create_proxy_session = create_proxy_session
    monkeypatch.setitem(sys.modules, "atroposlib.envs.server_handling.proxy_client", client)
    monkeypatch.setenv("ATROPOS_PROXY_URL", "http://proxy")
    manager = ServerManager([APIServerConfig(base_url="http://a/v1", model_name="m")], use_proxy=True)

    async with manager.managed_server(base_url="http://b/v1") as session:
        assert session.is_open
        assert session.url == "http://proxy"
        assert session.options == {
            "base_url": "http://b/v1", "tool_parser": "hermes", "model_name": "m", "require_version": False,
        }  # fmt: skip
    assert not session.is_open
    manager.tool_parser = "llama3_json"
    manager.train_only_on_published_versions()
    async with manager.managed_server() as session:
        assert session.options == {
            "base_url": None, "tool_parser": "llama3_json", "model_name": "m", "require_version": True,
        }, "the proxy spreads sessions over the servers that it knows"  # fmt: skip
    await manager.close()


async def test_a_proxy_without_an_address_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATROPOS_PROXY_URL", raising=False)
    manager = ServerManager([APIServerConfig(base_url="http://a/v1")], use_proxy=True)

    with pytest.raises(ConfigError, match="ATROPOS_PROXY_URL"):
        async with manager.managed_server():
            pass
    await manager.close()


async def test_the_variable_alone_sends_no_session_to_the_proxy(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    monkeypatch.setenv("ATROPOS_PROXY_URL", "http://proxy")
    manager, _ = a_pool("a")

    assert manager.proxy_url == "http://proxy"
    async with manager.managed_server(tokenizer=tokenizer) as session:
        assert isinstance(session, ManagedServer)
    await manager.close()


async def test_testing_answers_from_the_harness() -> None:
    manager = ServerManager([], testing=True)
    [harness] = manager.servers
    canned: Any = harness
    canned.set_desired_response(MESSAGES, create_chat_completion("hello"))
    canned.set_tokens_and_logprobs_response("x", [1, 2], [[3]], [[-0.5]], ["stop"])
    await manager.update_weight(0.5)
    await manager.wait_for_sem(is_training=True)

    answer = await manager.chat_completion(messages=MESSAGES)

    assert answer.choices[0].message.content == "hello"
    assert await manager.tokens_and_logprobs_completion(prompt="x") == ([1, 2], [[3]], [[-0.5]], ["stop"])
    await manager.close()


def test_each_config_gets_the_client_of_its_type_and_a_missing_address_is_an_error() -> None:
    types = ["openai", "vllm", "sglang", "trl"]
    configs = [APIServerConfig(base_url="http://a/v1", server_type=server_type) for server_type in types]  # type: ignore[arg-type]

    names = [type(server).__name__ for server in ServerManager(configs).servers]

    assert names == ["OpenAIServer", "VLLMServer", "SGLangServer", "TrlVllmServer"]
    with pytest.raises(ConfigError, match=r"openai\.base_url"):
        ServerManager(APIServerConfig(server_type="vllm"))


def test_a_bare_config_keeps_its_address_and_key() -> None:
    manager = ServerManager(APIServerConfig(base_url="http://a/v1", api_key="k"))

    [server] = manager.servers
    assert (server.config.base_url, server.config.api_key) == ("http://a/v1", "k")
    assert manager._get_server_base_url() == "http://a/v1"
