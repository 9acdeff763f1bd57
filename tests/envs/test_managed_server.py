"""Token-exact sessions, over the mock's real HTTP and a real tokenizer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from atroposlib.envs.base import APIServerConfig
from atroposlib.envs.server_handling.managed_server import SequenceNode
from atroposlib.envs.server_handling.server_manager import ServerManager
from atroposlib.testing.mock_inference import MockInferenceServer

EOS = 2


@pytest.fixture
async def engine(tokenizer: Any) -> AsyncIterator[MockInferenceServer]:
    """Answers "ok 0", "ok 1", ... and ends the turn."""
    async with MockInferenceServer(
        lambda prompt, index: [*tokenizer.encode(f"ok {index}"), EOS], weight_version="7"
    ) as server:
        yield server


@pytest.fixture
async def manager(engine: MockInferenceServer) -> AsyncIterator[ServerManager]:
    manager = ServerManager([APIServerConfig(base_url=engine.url, server_type="vllm", timeout=10)])
    yield manager
    await manager.close()


def aligned(node: SequenceNode) -> bool:
    lengths = {
        len(node.tokens),
        len(node.masked_tokens),
        len(node.logprobs),
        sum(length for _, length in node.policy_versions),
    }
    return len(lengths) == 1


async def test_one_request_gives_a_node_for_each_choice_in_order(
    engine: MockInferenceServer, manager: ServerManager, tokenizer: Any
) -> None:
    async with manager.managed_server(tokenizer=tokenizer) as session:
        answer = await session.chat_completion(messages=[{"role": "user", "content": "hi"}], n=3, max_tokens=20)
        nodes = session.get_state()["nodes"]

    assert len(engine.requests) == 1
    assert [choice.message.content for choice in answer.choices] == ["ok 0", "ok 1", "ok 2"]
    for i, node in enumerate(nodes):
        prompt = engine.requests[0]["token_ids"]
        completion = [*tokenizer.encode(f"ok {i}"), EOS]
        assert node.tokens == prompt + completion
        assert node.masked_tokens == [-100] * len(prompt) + completion
        assert node.logprobs == [1.0] * len(prompt) + [-0.25 * (k + 1) for k in range(len(completion))]
        assert node.policy_versions == [(-1, len(prompt)), (7, len(completion))]
        assert node.metadata == {"finish_reason": "stop"}


async def test_a_second_turn_keeps_the_sampled_ids_and_does_not_double_the_terminator(
    engine: MockInferenceServer, manager: ServerManager, tokenizer: Any
) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
    async with manager.managed_server(tokenizer=tokenizer) as session:
        first = await session.chat_completion(messages=messages, max_tokens=20)
        [before] = session.get_state()["nodes"]
        messages += [
            {"role": "assistant", "content": first.choices[0].message.content},
            {"role": "user", "content": "more"},
        ]
        await session.chat_completion(messages=messages, max_tokens=20)
        [after] = session.get_state()["nodes"]

    assert after.tokens[: len(before.tokens)] == before.tokens
    assert engine.requests[1]["token_ids"] == tokenizer.encode(
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    )
    assert after.tokens.count(EOS) == 4, "two user turns, two replies"
    assert aligned(after)
    # Both replies are trained, and nothing else.
    assert tokenizer.decode(after.completion_ids) == "ok 0<|im_end|>ok 0<|im_end|>"
    assert session.segments_restarted == 0


async def test_a_cut_reply_is_continued_exactly(
    engine: MockInferenceServer, manager: ServerManager, tokenizer: Any
) -> None:
    async with manager.managed_server(tokenizer=tokenizer) as session:
        cut = await session.completion(prompt="say: ", max_tokens=2)
        text = "say: " + cut.choices[0].text
        await session.completion(prompt=text, max_tokens=20)
        [node] = session.get_state()["nodes"]

    assert cut.choices[0].finish_reason == "length"
    assert node.full_text == "say: okok 0"
    assert tokenizer.decode(node.completion_ids) == "okok 0<|im_end|>"
    assert aligned(node)


async def test_a_conversation_that_cannot_be_extended_exactly_starts_a_new_segment(
    manager: ServerManager, tokenizer: Any
) -> None:
    async with manager.managed_server(tokenizer=tokenizer) as session:
        await session.chat_completion(messages=[{"role": "user", "content": "hi"}], max_tokens=20)
        rewritten = [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "ok 0 and more"},
            {"role": "user", "content": "?"},
        ]
        await session.chat_completion(messages=rewritten, max_tokens=20)
        first, second = session.get_state()["nodes"]

    assert session.segments_restarted == 1
    assert tokenizer.decode(second.completion_ids) == "ok 0<|im_end|>"
    assert aligned(first)
    assert aligned(second)


async def test_a_choice_is_extended_by_its_own_text(manager: ServerManager, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "hi"}]
    async with manager.managed_server(tokenizer=tokenizer) as session:
        await session.chat_completion(messages=messages, n=2, max_tokens=20)
        await session.chat_completion(
            messages=[*messages, {"role": "assistant", "content": "ok 1"}, {"role": "user", "content": "?"}],
            max_tokens=20,
        )
        first, second = session.get_state()["nodes"]

    assert tokenizer.decode(first.completion_ids) == "ok 0<|im_end|>"
    assert tokenizer.decode(second.completion_ids) == "ok 1<|im_end|>ok 0<|im_end|>"


async def test_an_update_in_flight_shows_in_the_versions(
    engine: MockInferenceServer, manager: ServerManager, tokenizer: Any
) -> None:
    engine.version_changes_at, engine.next_version = 2, "8"

    async with manager.managed_server(tokenizer=tokenizer) as session:
        [reply] = await session.sample_replies(messages=[{"role": "user", "content": "hi"}], max_tokens=20)

    node = reply.node
    assert node.policy_versions == [(-1, len(node.tokens) - 5), (7, 2), (8, 3)]


async def test_a_prefill_belongs_to_the_prompt(
    engine: MockInferenceServer, manager: ServerManager, tokenizer: Any
) -> None:
    async with manager.managed_server(tokenizer=tokenizer) as session:
        [reply] = await session.sample_replies(
            messages=[{"role": "user", "content": "hi"}], prefill="sure:", max_tokens=20
        )

    assert tokenizer.decode(engine.requests[0]["token_ids"]).endswith("<|im_start|>assistant\nsure:")
    assert tokenizer.decode(reply.node.completion_ids) == "ok 0<|im_end|>"


async def test_the_template_bos_is_not_doubled(
    engine: MockInferenceServer, manager: ServerManager, tokenizer: Any
) -> None:
    async with manager.managed_server(tokenizer=tokenizer) as session:
        await session.sample_replies(messages=[{"role": "user", "content": "hi"}], max_tokens=20)

    assert engine.requests[0]["token_ids"][:2].count(1) == 1


async def test_without_a_token_server_the_error_says_what_to_use() -> None:
    manager = ServerManager([APIServerConfig(base_url="http://localhost:1/v1", server_type="openai")])

    with pytest.raises(NotImplementedError, match="server_type vllm"):
        async with manager.managed_server():
            pass
