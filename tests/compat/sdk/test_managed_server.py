"""What environments read off a managed session, row by row; long conversations are tested beside the session itself."""

from __future__ import annotations

import logging
import re
from types import SimpleNamespace
from typing import Any

import pytest

from atroposlib.envs.base import APIServerConfig, ServerManager
from atroposlib.envs.server_handling.managed_server import DummyManagedServer, ManagedServer, SequenceNode
from atroposlib.envs.server_handling.managed_server_proxy import create_app
from atroposlib.envs.server_handling.tool_call_translator import ToolCallTranslator
from tests.envs.fake_servers import TextServer
from tests.envs.session_fakes import EOS, ScriptedServer, UpstreamStyleServer

USER = {"role": "user", "content": "hi"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'


@pytest.fixture
def server(tokenizer: Any) -> ScriptedServer:
    return ScriptedServer(tokenizer, lambda prompt, index: f"ok {index}")


def test_a_node_is_a_model_with_these_fields() -> None:
    node = SequenceNode(full_text="ab", tokens=[1, 2], masked_tokens=[-100, 2], logprobs=[1.0, -0.5])

    assert node.metadata is None
    assert {"full_text", "tokens", "masked_tokens", "logprobs", "metadata"} <= set(node.model_dump())


def test_attributes_of_a_session(server: ScriptedServer, tokenizer: Any) -> None:
    session = ManagedServer(server, tokenizer, False, "hermes", True)

    assert (session.server, session.tokenizer, session.track_tree) == (server, tokenizer, False)
    assert (session.current_nodes, session._tool_parser_name) == ([], "hermes")
    assert ManagedServer(server, track_tree=True).sequences == {}


def test_the_tokenizer_is_the_servers_own_where_none_is_given(server: ScriptedServer, tokenizer: Any) -> None:
    assert ManagedServer(server).tokenizer is tokenizer


def test_without_any_tokenizer_there_is_a_warning_and_none(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert ManagedServer(object()).tokenizer is None

    assert "no tokenizer" in caplog.text


async def test_n_choices_of_a_fresh_prompt_are_n_nodes_in_their_order(server: ScriptedServer, tokenizer: Any) -> None:
    session = ManagedServer(server, tokenizer)

    answer = await session.chat_completion(messages=[USER], n=3)

    nodes = session.get_state()["nodes"]
    prompt = tokenizer.encode(tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True))
    assert [choice.message.content for choice in answer.choices] == ["ok 0", "ok 1", "ok 2"]
    for index, node in enumerate(nodes):
        sampled = [*tokenizer.encode(f"ok {index}", add_special_tokens=False), EOS]
        assert node.tokens == prompt + sampled
        assert node.masked_tokens == [-100] * len(prompt) + sampled
        assert node.logprobs[: len(prompt)] == [1.0] * len(prompt)
        assert node.metadata == {"finish_reason": "stop"}


async def test_prompt_and_ids_both_go_to_the_server(server: ScriptedServer, tokenizer: Any) -> None:
    await ManagedServer(server, tokenizer).completion(prompt="say ", temperature=0.5)

    assert server.requests[0]["prompt"] == "say "
    assert server.requests[0]["input_ids"] == tokenizer.encode("say ")
    assert server.requests[0]["temperature"] == 0.5


@pytest.mark.parametrize("is_chat", [True, False], ids=["chat", "text"])
async def test_all_turns_of_a_conversation_are_trained(is_chat: bool, server: ScriptedServer, tokenizer: Any) -> None:
    """Through text completions Atropos 0.4.0 trains the last turn only."""
    session = ManagedServer(server, tokenizer)
    messages = [USER, {"role": "assistant", "content": "ok 0"}, USER]

    def text(of: list[dict[str, str]]) -> str:
        return str(tokenizer.apply_chat_template(of, tokenize=False, add_generation_prompt=True))

    for part in (messages[:1], messages):
        await (session.chat_completion(messages=part) if is_chat else session.completion(prompt=text(part)))

    [node] = session.get_state()["nodes"]
    assert tokenizer.decode([token for token in node.masked_tokens if token != -100]) == "ok 0<|im_end|>" * 2
    assert tokenizer.decode(node.tokens) == text(messages) + "ok 0<|im_end|>", "no terminator is doubled"


async def test_a_tree_keeps_nodes_by_their_text(server: ScriptedServer, tokenizer: Any) -> None:
    session = ManagedServer(server, tokenizer, track_tree=True)

    await session.completion(prompt="say ")

    state = session.get_state()
    assert list(state["sequences"]) == ["say ok 0"]
    assert set(state) == {"sequences", "tree"}


async def test_reset_forgets_and_copies_stay(server: ScriptedServer, tokenizer: Any) -> None:
    session = ManagedServer(server, tokenizer)
    await session.completion(prompt="say ")
    kept = session.get_state()["nodes"]

    session.reset()

    assert (session.get_state(), len(kept)) == ({"nodes": []}, 1)


async def test_answers_are_the_openai_packages_objects(server: ScriptedServer, tokenizer: Any) -> None:
    from openai.types import Completion
    from openai.types.chat import ChatCompletion

    session = ManagedServer(server, tokenizer)
    chat, text = await session.chat_completion(messages=[USER]), await session.completion(prompt="x")

    assert isinstance(chat, ChatCompletion)
    assert isinstance(text, Completion)
    assert (chat.model, chat.usage, text.model) == ("scripted", None, "scripted")


@pytest.mark.parametrize(("given", "expected"), [({"type": "length", "length": 3}, "length"), ("stop", "stop")])
async def test_a_finish_reason_may_be_a_dict(given: Any, expected: str, tokenizer: Any) -> None:
    server = UpstreamStyleServer(([1], [[7]], [[-0.5]], [given]), tokenizer)

    session = ManagedServer(server, tokenizer)
    answer = await session.completion(prompt="x")

    assert answer.choices[0].finish_reason == expected
    assert session.get_state()["nodes"][0].metadata == {"finish_reason": expected}


async def test_a_prompt_that_ends_with_the_assistant_is_continued(server: ScriptedServer, tokenizer: Any) -> None:
    await ManagedServer(server, tokenizer).chat_completion(messages=[USER, {"role": "assistant", "content": "so"}])

    assert not server.requests[0]["prompt"].endswith("<|im_start|>assistant\n"), "no new turn is opened"


async def test_think_blocks_of_earlier_replies_survive_the_template(tokenizer: Any) -> None:
    server = ScriptedServer(tokenizer, lambda prompt, index: "<think>deep</think>so")
    session = ManagedServer(server, tokenizer)
    first = await session.chat_completion(messages=[USER])

    reply = {"role": "assistant", "content": first.choices[0].message.content}
    await session.chat_completion(messages=[USER, reply, USER])

    assert "<think>deep</think>so" in server.requests[1]["prompt"]


# Tools


async def test_tool_calls_are_plain_dicts_and_the_node_is_raw(tokenizer: Any) -> None:
    session = ManagedServer(ScriptedServer(tokenizer, lambda prompt, index: CALL), tokenizer, tool_parser="hermes")

    answer = await session.chat_completion(messages=[USER], tools=TOOLS)

    calls: Any = answer.choices[0].message.tool_calls
    assert (calls[0]["function"]["name"], calls[0]["function"]["arguments"]) == ("add", '{"a": 1}')
    assert answer.choices[0].finish_reason == "tool_calls"
    assert session.get_state()["nodes"][0].full_text.endswith(CALL)


@pytest.mark.parametrize(("parser", "choice"), [(None, "auto"), ("hermes", "none")])
async def test_tools_do_nothing_without_a_parser_or_when_not_wanted(
    parser: str | None, choice: str, tokenizer: Any
) -> None:
    server = ScriptedServer(tokenizer, lambda prompt, index: CALL)
    session = ManagedServer(server, tokenizer, tool_parser=parser)

    answer = await session.chat_completion(messages=[USER], tools=TOOLS, tool_choice=choice)

    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (CALL, "stop")
    assert "tools" not in server.requests[0]


def test_the_translator_reads_writes_and_remembers(tokenizer: Any) -> None:
    translator = ToolCallTranslator(tokenizer)

    content, calls, reason = translator.parse_model_output(f"so {CALL}", tools=TOOLS)

    assert calls is not None
    assert (reason, calls[0].function.name) == ("tool_calls", "add")
    assert translator.call_id_to_raw_text[calls[0].id] == f"so {CALL}"
    assert translator.parse_model_output(CALL, tool_choice="none", tools=TOOLS) == (CALL, None, "stop")
    assert translator.parse_model_output(CALL) == (CALL, None, "stop")
    given = {
        "role": "assistant",
        "content": "x",
        "tool_calls": [{"id": "?", "function": {"name": "f", "arguments": "{}"}}],
    }
    (converted,) = translator.convert_messages_for_template([given])
    assert "<tool_call>" in converted["content"]
    assert content is not None


# The manager's sessions


async def test_the_managers_tool_parser_is_read_at_each_session(tokenizer: Any) -> None:
    manager = ServerManager([APIServerConfig(base_url="http://a/v1", server_type="vllm")])
    manager.tool_parser = "hermes"

    async with manager.managed_server(tokenizer=tokenizer) as session:
        assert session._tool_parser_name == "hermes"
    await manager.close()


async def test_a_text_server_has_no_sessions_unless_dummies_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = ServerManager([APIServerConfig(base_url="http://a/v1")], TextServer)
    monkeypatch.delenv("ATROPOS_ALLOW_DUMMY_MANAGED_SERVER", raising=False)
    with pytest.raises(NotImplementedError, match="ATROPOS_ALLOW_DUMMY_MANAGED_SERVER"):
        async with manager.managed_server():
            pass

    monkeypatch.setenv("ATROPOS_ALLOW_DUMMY_MANAGED_SERVER", "yes")
    async with manager.managed_server() as session:
        assert isinstance(session, DummyManagedServer)
        await session.chat_completion(messages=[USER])
        [node] = session.get_state()["nodes"]
    await manager.close()

    assert (node.tokens, node.masked_tokens[0], set(node.logprobs)) == (list(range(128)), -100, {-0.5})
    assert node.metadata["dummy_tokens"] is True


# The proxy


def test_the_routes_of_the_proxy(tokenizer: Any) -> None:
    app = create_app(SimpleNamespace(servers=[]), tokenizer)

    paths = app.openapi()["paths"]
    routes = {(method.upper(), re.sub(r"{\w+}", "{uuid}", path)) for path, of in paths.items() for method in of}
    assert routes >= {
        ("GET", "/health"), ("GET", "/v1/models"), ("POST", "/setup"), ("GET", "/servers"), ("POST", "/sessions/create"),
        ("GET", "/sessions"), ("POST", "/{uuid}/v1/chat/completions"), ("POST", "/{uuid}/v1/chat/completions/render"),
        ("GET", "/{uuid}/nodes"), ("DELETE", "/{uuid}"),
    }  # fmt: skip
