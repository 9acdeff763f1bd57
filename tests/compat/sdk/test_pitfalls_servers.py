"""Regression tests of the pitfalls around inference servers and sessions; the table is in test_pitfalls.py."""

from __future__ import annotations

import asyncio
import logging
import sys
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from atroposlib.envs.base import APIServerConfig, ServerManager
from atroposlib.envs.server_handling import proxy_client
from atroposlib.envs.server_handling.managed_server import ManagedServer, SequenceNode
from atroposlib.envs.server_handling.managed_server_proxy import create_app
from atroposlib.envs.server_handling.openai_server import OpenAIServer
from atroposlib.envs.server_handling.proxy_client import create_proxy_session
from atroposlib.envs.server_handling.server_harness import create_chat_completion
from atroposlib.envs.server_handling.sessions.session_tree import node_to_extend, place
from atroposlib.envs.server_handling.sglang_server import SGLangServer
from atroposlib.envs.server_handling.tool_call_translator import ToolCallTranslator
from atroposlib.envs.server_handling.trl_vllm_server import TrlVllmServer
from atroposlib.envs.server_handling.vllm_server import VLLMServer
from atroposlib.errors import ModelServerError
from atroposlib.testing.byte_tokenizer import byte_tokenizer
from tests.envs.engine_fakes import FakeEngine, chat_answer
from tests.envs.fake_servers import a_pool, until
from tests.envs.session_fakes import EOS, ScriptedServer

USER = {"role": "user", "content": "1 + 1?"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
STRIPPING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content.split('</think>')[-1] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_pitfall_01_a_bare_config_is_the_one_server_it_names() -> None:
    manager = ServerManager(APIServerConfig(base_url="http://mine:9/v1", api_key="k", health_check=False))

    [server] = manager.servers
    assert (server.config.base_url, server.config.api_key, server.config.health_check) == (
        "http://mine:9/v1",
        "k",
        False,
    )


async def test_pitfall_25_evaluations_keep_their_split_and_are_spread() -> None:
    manager, servers = a_pool("ab", num_max_requests_at_once=1)
    for server in servers:
        server.open.clear()

    asking = [asyncio.create_task(manager.chat_completion(messages=[])) for _ in range(2)]
    await until(lambda: sum(server.now for server in servers) == 2)
    asking += [asyncio.create_task(manager.chat_completion(messages=[], split="eval")) for _ in range(4)]
    await until(lambda: sum(server.now for server in servers) == 6)
    free = [(server.sem._value, server.eval_sem._value) for server in servers]
    for server in servers:
        server.open.set()
    await asyncio.gather(*asking)
    await manager.close()

    assert free == [(0, 62), (0, 62)], "they start although training has all of its slots, half on each server"
    assert [len(server.eval_request_timings) for server in servers] == [2, 2]


async def test_pitfall_26_who_waits_for_a_slot_is_woken_not_polled(monkeypatch: pytest.MonkeyPatch) -> None:
    naps: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float, *rest: Any) -> None:
        naps.append(seconds)
        await sleep(seconds, *rest)

    manager, (server,) = a_pool("a", num_max_requests_at_once=1)
    server.open.clear()
    first = asyncio.create_task(manager.chat_completion(messages=[]))
    await until(lambda: server.now == 1)
    monkeypatch.setattr(asyncio, "sleep", noted)
    second = asyncio.create_task(manager.chat_completion(messages=[]))
    await sleep(0.01)
    server.open.set()
    await asyncio.gather(first, second)
    monkeypatch.undo()
    await manager.close()

    assert len(server.calls) == 2
    assert set(naps) <= {0}


@pytest.mark.parametrize(("cls", "kind"), [(OpenAIServer, "openai"), (VLLMServer, "vllm"), (SGLangServer, "sglang")])
async def test_pitfall_27_asking_for_health_costs_no_completion(cls: Any, kind: Any) -> None:
    routes: dict[str, Any] = {
        f"GET {path}": lambda body: (200, {}) for path in ("/v1/models", "/health", "/health_generate")
    }
    async with FakeEngine(routes) as engine:
        server = cls(APIServerConfig(base_url=engine.url, server_type=kind))
        await server.check_health()
        await server.close()

    assert [route.split()[0] for route, _ in engine.asked] == ["GET"]


async def test_pitfall_27_a_server_that_works_is_not_asked() -> None:
    manager, servers = a_pool("ab")

    await asyncio.gather(*(manager.chat_completion(messages=[]) for _ in range(8)))
    await manager.close()

    assert [server.checks for server in servers] == [0, 0]


async def test_pitfall_28_one_policy_of_retries_and_the_cause_is_raised() -> None:
    async with FakeEngine({"POST /v1/chat/completions": lambda body: (500, {"error": "out of memory"})}) as engine:
        server = OpenAIServer(APIServerConfig(base_url=engine.url))
        with pytest.raises(ModelServerError, match="out of memory"):
            await server.chat_completion(messages=[])
        await server.close()

    assert len(engine.asked) == 1, "trying again is the manager's part alone"


async def test_pitfall_29_sessions_on_one_server_do_not_starve_each_other() -> None:
    manager, _ = a_pool("a", num_max_requests_at_once=8)
    await manager.update_weight(0.01)

    async def converse() -> int:
        async with manager.dedicated_server() as server:
            return len([await server.chat_completion(messages=[]) for _ in range(2)])

    async with asyncio.timeout(5):
        assert await asyncio.gather(*(converse() for _ in range(6))) == [2] * 6
    await manager.close()


@pytest.mark.parametrize("is_chat", [True, False], ids=["chat", "text"])
async def test_pitfall_30_the_end_of_a_turn_is_there_once_and_every_turn_trains(is_chat: bool, tokenizer: Any) -> None:
    server = ScriptedServer(tokenizer, lambda prompt, index: "two")
    session = ManagedServer(server, tokenizer)
    turns = [[USER], [USER, {"role": "assistant", "content": "two"}, USER]]

    for messages in turns:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        await (session.chat_completion(messages=messages) if is_chat else session.completion(prompt=text))

    [node] = session.get_state()["nodes"]
    assert node.tokens.count(EOS) == 4, "two turns of the user, two replies"
    assert server.requests[1]["input_ids"].count(EOS) == 3
    assert [mask for mask in node.masked_tokens if mask != -100].count(EOS) == 2


def a_node(text: str) -> SequenceNode:
    return SequenceNode(full_text=text, tokens=[1], masked_tokens=[-100], logprobs=[1.0])


def test_pitfall_31_the_longest_sequence_is_extended_and_twins_are_told_apart() -> None:
    short, first, twin = a_node("a"), a_node("ab"), a_node("ab")
    nodes = [short, first, twin]

    assert node_to_extend(nodes, "abc") is first
    assert node_to_extend(nodes, "abc", claimed=[id(first)]) is twin
    grown = a_node("abc")
    place(nodes, twin, [grown])
    assert [id(node) for node in nodes] == [id(short), id(first), id(grown)]


@pytest.mark.parametrize(("preserve", "is_kept"), [(False, True), (True, False)])
async def test_pitfall_32_think_blocks_survive_by_default_and_the_flag_leaves_them_to_the_template(
    preserve: bool, is_kept: bool
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = STRIPPING
    server = ScriptedServer(tokenizer, lambda prompt, index: "ok")
    session = ManagedServer(server, tokenizer, preserve_think_blocks=preserve)

    await session.chat_completion(messages=[USER, {"role": "assistant", "content": "<think>deep</think>so"}, USER])

    assert ("deep" in server.requests[0]["prompt"]) is is_kept


async def test_pitfall_32_a_reply_that_was_cut_says_so_with_tools_on(tokenizer: Any) -> None:
    session = ManagedServer(ScriptedServer(tokenizer, lambda prompt, index: "long"), tokenizer, tool_parser="hermes")

    answer = await session.chat_completion(messages=[USER], tools=TOOLS, max_tokens=2)

    assert answer.choices[0].finish_reason == "length"


async def test_pitfall_33_a_proxied_session_has_calls_nodes_and_options(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ScriptedServer(tokenizer, lambda prompt, index: CALL)
    server.config = SimpleNamespace(model_name="m", tokenizer_name="none", base_url="http://one/v1", server_type="vllm")
    app = create_app(SimpleNamespace(servers=[server]), tokenizer, "m")
    monkeypatch.setattr(proxy_client, "_new_client", lambda: httpx.AsyncClient(transport=httpx.ASGITransport(app)))

    async with await create_proxy_session("http://proxy") as session:
        answer = await session.chat_completion(messages=[USER], tools=TOOLS, top_p=0.5, seed=4)
        nodes = session.get_state()["nodes"]

    calls: Any = answer.choices[0].message.tool_calls
    assert calls[0]["function"]["name"] == "add"
    assert [node.full_text.endswith(CALL) for node in nodes] == [True]
    assert (server.requests[0]["top_p"], server.requests[0]["seed"]) == (0.5, 4)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy") as client:
        assert (await client.get("/health")).json()["sessions"] == 0, "it is deleted at the end"


async def test_pitfall_34_testing_works() -> None:
    manager = ServerManager([APIServerConfig(base_url="http://a/v1")], testing=True)
    harness: Any = manager.servers[0]
    harness.set_desired_response([USER], create_chat_completion("2"))

    assert (await manager.chat_completion(messages=[USER])).choices[0].message.content == "2"
    await manager.close()


def test_pitfall_34_several_gpus_a_server_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SLURM_JOB_NODELIST", "n[1-2]"), ("NUM_TRAINING_NODES", "1"), ("INFER_TP", "4"), ("PATH", "")):
        monkeypatch.setenv(name, value)

    manager = ServerManager([APIServerConfig(base_url="http://a/v1")], slurm=True)

    assert [server.config.base_url for server in manager.servers] == ["http://n2:9000/v1", "http://n2:9001/v1"]


async def test_pitfall_34_trl_gives_tokens_with_logprobs(tokenizer: Any) -> None:
    answer = {"completion_ids": [[7, 8]], "logprobs": [[-0.5, -0.25]]}
    async with FakeEngine({"POST /generate/": lambda body: (200, answer)}) as engine:
        config = APIServerConfig(base_url=engine.url.removesuffix("/v1"), server_type="trl")
        server = TrlVllmServer(config)
        vars(server)["tokenizer"] = tokenizer
        found = await server.tokens_and_logprobs_completion(input_ids=[1])
        await server.close()

    assert found == ([1], [[7, 8]], [[-0.5, -0.25]], ["length"])


def test_pitfall_45_tool_calls_are_read_without_vllm(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)

    with caplog.at_level(logging.WARNING):
        _, calls, reason = ToolCallTranslator(tokenizer, "hermes").parse_model_output(CALL, tools=TOOLS)

    assert calls is not None
    assert (calls[0].function.name, calls[0].function.arguments, reason) == ("add", '{"a": 1}', "tool_calls")
    assert caplog.records == []


async def test_pitfall_01_its_key_and_address_are_used() -> None:
    async with FakeEngine({"POST /v1/chat/completions": lambda body: (200, chat_answer("yes"))}) as engine:
        manager = ServerManager(APIServerConfig(base_url=engine.url, api_key="k"))
        await manager.chat_completion(messages=[USER])
        await manager.close()

    assert engine.headers[0]["Authorization"] == "Bearer k"
