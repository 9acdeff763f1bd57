"""Canned answers in the place of inference servers."""

from __future__ import annotations

import pytest

from atroposlib.envs.server_handling.server_baseline import APIServer
from atroposlib.envs.server_handling.server_harness import ServerHarness, create_chat_completion, create_completion
from atroposlib.errors import RolloutError

MESSAGES = [{"role": "system", "content": "be short"}, {"role": "user", "content": "hi"}]


def test_the_answers_are_the_packages_objects() -> None:
    chat = create_chat_completion("yes", n=2)
    text = create_completion(["a", "b"], finish_reason=["stop", "length"])

    assert (chat.id, chat.model, chat.created) == ("test_id", "test_model", 0)
    assert [choice.message.content for choice in chat.choices] == ["yes", "yes"]
    assert [choice.index for choice in chat.choices] == [0, 1]
    assert [(choice.text, choice.finish_reason) for choice in text.choices] == [("a", "stop"), ("b", "length")]


async def test_what_was_set_is_answered_and_anything_else_is_none() -> None:
    harness = ServerHarness()
    chat, text = create_chat_completion("yes"), create_completion("more")
    harness.set_desired_response(MESSAGES, chat)
    harness.set_desired_completion("once", text)

    assert await harness.chat_completion(messages=MESSAGES, n=1) is chat
    assert await harness.chat_completion(MESSAGES) is chat
    assert await harness.completion(prompt="once", split="eval") is text
    assert await harness.chat_completion(messages=MESSAGES[:1]) is None
    assert await harness.completion(prompt="twice") is None
    assert await harness.tokens_and_logprobs_completion(prompt="once") is None
    assert harness.conv_to_dictkey(MESSAGES) in harness.response_map


async def test_tokens_are_found_by_text_or_by_ids() -> None:
    harness = ServerHarness()
    harness.set_tokens_and_logprobs_response("p", [1, 2], [[3], [4, 5]], [[-0.1], [-0.2, -0.3]], ["stop", "length"])
    expected = ([1, 2], [[3], [4, 5]], [[-0.1], [-0.2, -0.3]], ["stop", "length"])

    assert await harness.tokens_and_logprobs_completion(prompt="p") == expected
    assert await harness.tokens_and_logprobs_completion(input_ids=[1, 2]) == expected
    samples = await harness.sample_tokens(input_ids=[1, 2])

    assert samples.as_lists() == expected
    assert harness.load.sampled_tokens == 3


async def test_sampling_what_was_never_set_names_the_prompt_and_what_is_known() -> None:
    harness = ServerHarness()
    harness.set_tokens_and_logprobs_response("known", [1], [[3]], [[-0.1]], ["stop"])

    with pytest.raises(RolloutError, match=r"'other'.*\['known'\]"):
        await harness.sample_tokens(prompt="other")


async def test_it_is_a_server_like_any_other() -> None:
    harness = ServerHarness()

    assert isinstance(harness, APIServer)
    assert harness.server_healthy
    assert harness.returns_tokens
    assert await harness.recover()
    assert harness.config.model_name == "test_model"
    assert await harness.engine_load() is None
    assert await harness.current_version() is None
    await harness.update_weight(0.5)
    await harness.close()
