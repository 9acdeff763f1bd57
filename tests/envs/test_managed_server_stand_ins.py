"""The session over text servers, and the session that looks like an OpenAI client."""

from __future__ import annotations

from typing import Any

import pytest

from atroposlib.envs.server_handling.managed_server import DummyManagedServer, ManagedServer, ManagedServerAdapter
from atroposlib.envs.server_handling.sessions.openai_answers import chat_answer, chat_choice, completion_answer
from tests.envs.session_fakes import ScriptedServer

USER = {"role": "user", "content": "hi"}


class TextServer:
    async def chat_completion(self, **kwargs: Any) -> Any:
        return chat_answer([chat_choice(i, f"ok {i}", None, "length") for i in range(kwargs.get("n", 1))], "text")

    async def completion(self, **kwargs: Any) -> Any:
        return completion_answer(["ok"], ["stop"], "text")


# Placeholders


async def test_dummy_nodes_have_real_text_and_tokens_that_say_what_they_are() -> None:
    session = DummyManagedServer(TextServer())

    answer = await session.chat_completion(messages=[USER], n=2)

    first, second = session.get_state()["nodes"]
    assert [choice.message.content for choice in answer.choices] == ["ok 0", "ok 1"]
    assert (first.full_text, second.full_text) == ("user:hi\n\nassistant:ok 0", "user:hi\n\nassistant:ok 1")
    assert first.tokens == list(range(128))
    assert first.masked_tokens == [-100, *range(1, 128)]
    assert first.logprobs == [-0.5] * 128
    assert first.metadata == {"finish_reason": "length", "dummy_tokens": True}


async def test_dummy_sessions_extend_and_reset_as_real_ones() -> None:
    session = DummyManagedServer(TextServer())

    await session.chat_completion(messages=[USER])
    await session.chat_completion(messages=[USER, {"role": "assistant", "content": "ok 0"}, USER])
    await session.completion(prompt="say ")

    assert [node.full_text for node in session.get_state()["nodes"]] == [
        "user:hi\n\nassistant:ok 0\n\nuser:hi\n\nassistant:ok 0",
        "say ok",
    ]
    session.reset()
    assert session.get_state() == {"nodes": []}
    with pytest.raises(NotImplementedError, match="placeholders"):
        await session.get_logprobs(prompt="x")


async def test_a_dummy_tree_is_keyed_by_text() -> None:
    session = DummyManagedServer(TextServer(), track_tree=True)

    await session.completion(prompt="say ")

    assert list(session.get_state()["sequences"]) == ["say ok"]


# An OpenAI client


async def test_an_adapter_fills_the_session_and_passes_only_sampling_options(tokenizer: Any) -> None:
    from openai import omit

    server = ScriptedServer(tokenizer, lambda prompt, index: "ok")
    session = ManagedServer(server, tokenizer)
    client = ManagedServerAdapter(session, base_url="http://somewhere/v1")

    chat = await client.chat.completions.create(
        model="m", messages=[USER], temperature=0.5, top_p=omit, extra_body={"top_k": 3}, timeout=5, stream=False
    )
    text = await client.completions.create(model="m", prompt="say ")

    assert (chat.choices[0].message.content, text.choices[0].text) == ("ok", "ok")
    assert client.base_url == "http://somewhere/v1"
    assert len(session.get_state()["nodes"]) == 2
    sent = {name: value for name, value in server.requests[0].items() if name not in ("input_ids", "prompt", "n")}
    assert sent == {"temperature": 0.5, "top_k": 3}


async def test_an_adapter_refuses_what_a_session_has_not(tokenizer: Any) -> None:
    client = ManagedServerAdapter(ManagedServer(object(), tokenizer), base_url="")

    with pytest.raises(NotImplementedError, match="raw routes"):
        await client.post("/x", {}, dict)
    with pytest.raises(NotImplementedError, match="copied"):
        client.copy()
    with pytest.raises(NotImplementedError, match="stream"):
        await client.chat.completions.create(messages=[USER], stream=True)
