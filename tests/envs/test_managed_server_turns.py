"""Sessions of many turns: what is extended, what starts anew, and whose tokens are whose."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atroposlib.envs.server_handling.managed_server import ManagedServer, SequenceNode
from atroposlib.envs.server_handling.server_harness import ServerHarness
from atroposlib.errors import ConfigError, RolloutError
from atroposlib.testing.byte_tokenizer import byte_tokenizer
from tests.envs.session_fakes import EOS, ScriptedServer, UpstreamStyleServer

USER = {"role": "user", "content": "hi"}

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What real templates do to old assistant turns: drop the thinking, trim.
STRIPPING_TEMPLATE = TEMPLATE.replace(
    "{{ message.content }}",
    "{% if message.role == 'assistant' %}{{ message.content.split('</think>')[-1] | trim }}"
    "{% else %}{{ message.content }}{% endif %}",
)


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


@cache
def with_template(template: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def assert_aligned(node: SequenceNode) -> None:
    n_versions = sum(length for _, length in node.policy_versions)
    assert len(node.tokens) == len(node.masked_tokens) == len(node.logprobs) == n_versions
    versions = [version for version, length in node.policy_versions for _ in range(length)]
    for token, mask, logprob, version in zip(node.tokens, node.masked_tokens, node.logprobs, versions, strict=True):
        assert (mask, logprob, version) == (-100, 1.0, -1) or (mask == token and logprob < 0 and version == 7)


# Any conversation

TURNS = st.lists(
    st.tuples(
        st.integers(0, 5),  # which earlier conversation to go on with
        st.text("a é\n<", max_size=4),  # what the user says
        st.text("b é\n \t</think>", max_size=6),  # what the model says
        st.integers(1, 2),  # n
        st.one_of(st.none(), st.integers(4, 8)),  # max_tokens
    ),
    min_size=1,
    max_size=7,
)


@dataclass
class Conversation:
    messages: list[dict[str, Any]] = field(default_factory=list)
    node: SequenceNode | None = None


@pytest.mark.parametrize("template", [TEMPLATE, STRIPPING_TEMPLATE], ids=["plain", "stripping"])
@pytest.mark.parametrize("track_tree", [False, True], ids=["list", "tree"])
@given(turns=TURNS)
@settings(deadline=None, max_examples=40)
def test_every_node_holds_exactly_what_was_said_and_trains_exactly_what_was_sampled(
    template: str, track_tree: bool, turns: list[Any]
) -> None:
    plain, tokenizer = with_template(TEMPLATE), with_template(template)
    replies: list[str] = []
    server = ScriptedServer(plain, lambda prompt, index: f"{len(server.requests):02}{index}{replies[-1]}")
    session = ManagedServer(server, tokenizer, track_tree=track_tree)
    conversations = [Conversation()]

    for which, said, reply, n, max_tokens in turns:
        replies.append(reply)
        before = conversations[which % len(conversations)]
        # In list mode a sequence that has gone on is not there any more: a branch from before starts a segment.
        can_extend = track_tree or any(node is before.node for node in session.current_nodes)
        trained = before.node.completion_ids if before.node and can_extend else []
        messages = [*before.messages, user(said)]
        sampled = asyncio.run(session.sample_replies(messages=messages, n=n, max_tokens=max_tokens))
        for index, node in enumerate(one.node for one in sampled):
            ids = [*plain.encode(f"{len(server.requests):02}{index}{reply}", add_special_tokens=False), EOS]
            ids = ids[:max_tokens]
            conversations.append(
                Conversation([*messages, assistant(plain.decode(ids, skip_special_tokens=True))], node)
            )

            assert_aligned(node)
            rendered = plain.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            assert plain.decode(node.tokens) == rendered + plain.decode(ids)
            assert node.completion_ids == trained + ids


# Segments


async def test_the_same_fresh_prompt_twice_is_two_rollouts_not_a_restart(tokenizer: Any) -> None:
    session = ManagedServer(ScriptedServer(tokenizer, lambda prompt, index: "ok"), tokenizer)

    await session.chat_completion(messages=[USER])
    await session.chat_completion(messages=[USER])

    assert len(session.get_state()["nodes"]) == 2
    assert session.segments_restarted == 0


async def test_a_rewritten_reply_restarts_a_segment_that_can_be_extended(tokenizer: Any) -> None:
    session = ManagedServer(ScriptedServer(tokenizer, lambda prompt, index: "ok"), tokenizer)

    await session.chat_completion(messages=[USER])
    rewritten = [USER, assistant("ok and more"), user("?")]
    await session.chat_completion(messages=rewritten)
    await session.chat_completion(messages=[*rewritten, assistant("ok"), user("!")])

    first, second = session.get_state()["nodes"]
    assert session.segments_restarted == 1
    assert tokenizer.decode(first.completion_ids) == "ok<|im_end|>"
    assert tokenizer.decode(second.completion_ids) == "ok<|im_end|>ok<|im_end|>"


async def test_text_completions_train_every_turn(tokenizer: Any) -> None:
    session = ManagedServer(ScriptedServer(tokenizer, lambda prompt, index: "ok"), tokenizer)

    first = await session.completion(prompt="say: ")
    await session.completion(prompt=f"say: {first.choices[0].text}<|im_end|> more: ")

    [node] = session.get_state()["nodes"]
    assert tokenizer.decode(node.completion_ids) == "ok<|im_end|>ok<|im_end|>"
    assert_aligned(node)


async def test_a_second_terminator_that_the_policy_samples_is_kept(tokenizer: Any) -> None:
    session = ManagedServer(ScriptedServer(tokenizer, lambda prompt, index: ""), tokenizer)

    await session.completion(prompt="a<|im_end|>")
    await session.completion(prompt="a<|im_end|><|im_end|>b")

    [node] = session.get_state()["nodes"]
    assert tokenizer.decode(node.tokens) == "a<|im_end|><|im_end|>b<|im_end|>"
    assert node.completion_ids == [EOS, EOS]


async def test_a_cut_that_falls_on_a_special_token_is_not_the_end_of_the_turn(tokenizer: Any) -> None:
    session = ManagedServer(ScriptedServer(tokenizer, lambda prompt, index: "a<|endoftext|>b"), tokenizer)

    cut = await session.chat_completion(messages=[USER], max_tokens=2)
    await session.chat_completion(messages=[USER, assistant("a"), user("?")])

    [node] = session.get_state()["nodes"]
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("a", "length")
    assert tokenizer.decode(node.tokens).split("assistant\n")[1] == (
        "a<|endoftext|><|im_end|>\n<|im_start|>user\n?<|im_end|>\n<|im_start|>"
    )


# Concurrent rollouts


async def test_interleaved_rollouts_that_said_the_same_each_keep_their_own_tokens(tokenizer: Any) -> None:
    server = ScriptedServer(tokenizer, lambda prompt, index: "A!" if "left" in prompt else "B!")
    session = ManagedServer(server, tokenizer)
    server.script = lambda prompt, index: "same"
    await session.chat_completion(messages=[USER], n=2)
    server.script = lambda prompt, index: "A!" if "left" in prompt else "B!"
    server.gates = {"left": asyncio.Event()}

    turn = [USER, assistant("same")]
    async with asyncio.TaskGroup() as tasks:
        left = tasks.create_task(session.sample_replies(messages=[*turn, user("left")]))
        await server.waiting.wait()
        # Starts while the other is in flight, and ends before it.
        right = await session.sample_replies(messages=[*turn, user("right")])
        server.gates["left"].set()

    texts = [tokenizer.decode(node.completion_ids) for node in session.get_state()["nodes"]]
    assert texts == ["same<|im_end|>A!<|im_end|>", "same<|im_end|>B!<|im_end|>"]
    assert [tokenizer.decode(one.node.completion_ids) for one in (*left.result(), *right)] == texts


async def test_a_branch_in_flight_loses_neither_side(tokenizer: Any) -> None:
    server = ScriptedServer(tokenizer, lambda prompt, index: "A!" if "left" in prompt else "B!")
    session = ManagedServer(server, tokenizer)
    await session.chat_completion(messages=[USER])
    server.gates = {"left": asyncio.Event()}
    turn = [USER, assistant("B!")]

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(session.chat_completion(messages=[*turn, user("left")]))
        await server.waiting.wait()
        await session.chat_completion(messages=[*turn, user("right")])
        server.gates["left"].set()

    texts = [tokenizer.decode(node.completion_ids) for node in session.get_state()["nodes"]]
    assert texts == ["B!<|im_end|>B!<|im_end|>", "B!<|im_end|>A!<|im_end|>"]


async def test_a_request_that_fails_leaves_its_sequence_free(tokenizer: Any) -> None:
    server = ScriptedServer(tokenizer, lambda prompt, index: "same")
    session = ManagedServer(server, tokenizer)
    await session.chat_completion(messages=[USER], n=2)
    turn = [USER, assistant("same"), user("x")]

    with pytest.raises(TypeError):
        await session.chat_completion(messages=turn, n=None)
    await session.chat_completion(messages=turn)

    first, second = session.get_state()["nodes"]
    assert (first.completion_ids.count(EOS), second.completion_ids.count(EOS)) == (2, 1)


# Templates


@pytest.mark.parametrize("reply", ["<think>so</think>ok", " ok\n"])
async def test_a_template_that_rewrites_old_turns_does_not_break_the_sequence(reply: str) -> None:
    tokenizer = with_template(STRIPPING_TEMPLATE)
    session = ManagedServer(ScriptedServer(tokenizer, lambda prompt, index: reply), tokenizer)

    first = await session.chat_completion(messages=[USER])
    turn = [USER, {"role": "assistant", "content": first.choices[0].message.content}, user("?")]
    await session.chat_completion(messages=turn)

    [node] = session.get_state()["nodes"]
    assert tokenizer.decode(node.completion_ids) == f"{reply}<|im_end|>" * 2
    assert session.segments_restarted == 0


async def test_think_blocks_that_nobody_sampled_survive_too() -> None:
    tokenizer = with_template(STRIPPING_TEMPLATE)
    session = ManagedServer(ScriptedServer(tokenizer, lambda prompt, index: "ok"), tokenizer)

    prompt, _ = session.render([USER, assistant("<think>so</think>ok"), user("?")])

    assert "<think>so</think>ok" in prompt


async def test_preserve_think_blocks_leaves_them_to_the_template() -> None:
    tokenizer = with_template(STRIPPING_TEMPLATE)
    server = ScriptedServer(tokenizer, lambda prompt, index: "<think>so</think>ok")
    session = ManagedServer(server, tokenizer, preserve_think_blocks=True)

    first = await session.chat_completion(messages=[USER])
    await session.chat_completion(messages=[USER, assistant(first.choices[0].message.content or ""), user("?")])

    assert "so" not in server.requests[1]["prompt"]
    assert session.segments_restarted == 1


async def test_a_think_block_that_the_generation_prompt_opens_stays_in_the_sequence() -> None:
    tokenizer = with_template(TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"))
    session = ManagedServer(ScriptedServer(tokenizer, lambda prompt, index: "so</think>ok"), tokenizer)

    first = await session.chat_completion(messages=[USER])
    await session.chat_completion(messages=[USER, assistant(first.choices[0].message.content or ""), user("?")])

    [node] = session.get_state()["nodes"]
    assert node.full_text.count("<|im_start|>assistant\n<think>\nso</think>ok") == 2
    assert session.segments_restarted == 0


async def test_a_prefilled_reply_is_extended(tokenizer: Any) -> None:
    session = ManagedServer(ScriptedServer(tokenizer, lambda prompt, index: "ok"), tokenizer)

    await session.sample_replies(messages=[USER], prefill="sure: ")
    await session.sample_replies(messages=[USER, assistant("sure: ok"), user("?")])

    [node] = session.get_state()["nodes"]
    assert tokenizer.decode(node.completion_ids) == "ok<|im_end|>ok<|im_end|>"


# Tree


async def test_a_tree_keeps_every_sequence_by_its_text(tokenizer: Any) -> None:
    server = ScriptedServer(tokenizer, lambda prompt, index: f"ok {index}")
    session = ManagedServer(server, tokenizer, track_tree=True)

    await session.chat_completion(messages=[USER], n=2)
    await session.chat_completion(messages=[USER, assistant("ok 1"), user("a")])
    await session.chat_completion(messages=[USER, assistant("ok 1"), user("b")])

    state = session.get_state()
    assert state["sequences"] == state["tree"]
    assert all(node.full_text == text for text, node in state["sequences"].items())
    assert [tokenizer.decode(node.completion_ids) for node in state["tree"].values()] == [
        "ok 0<|im_end|>",
        "ok 1<|im_end|>",
        "ok 1<|im_end|>ok 0<|im_end|>",
        "ok 1<|im_end|>ok 0<|im_end|>",
    ]


async def test_a_state_handed_out_outlives_the_session(tokenizer: Any) -> None:
    session = ManagedServer(ScriptedServer(tokenizer, lambda prompt, index: "ok"), tokenizer)
    await session.chat_completion(messages=[USER])

    state = session.get_state()
    session.reset()

    assert len(state["nodes"]) == 1
    assert session.get_state() == {"nodes": []}


# Servers of the upstream kind


async def test_a_server_with_the_upstream_method_only_gives_tokens_of_unknown_version(tokenizer: Any) -> None:
    prompt_ids = [5, 6, 7]
    answer = (prompt_ids, [[8, 9]], [[-0.5]], [{"type": "length", "length": 2}])
    server = UpstreamStyleServer(answer, tokenizer)
    session = ManagedServer(server)

    await session.completion(prompt="abc", temperature=0.5)

    [node] = session.get_state()["nodes"]
    assert (node.tokens, node.masked_tokens) == ([5, 6, 7, 8, 9], [-100, -100, -100, 8, 9])
    assert node.logprobs == [1.0, 1.0, 1.0, -0.5, 1.0]
    assert node.policy_versions == [(-1, 5)]
    assert node.metadata == {"finish_reason": "length"}
    assert server.requests == [{"prompt": "abc", "input_ids": tokenizer.encode("abc"), "temperature": 0.5}]


async def test_a_server_that_sampled_from_other_ids_starts_a_segment(tokenizer: Any) -> None:
    ids = tokenizer.encode("abc")
    server = UpstreamStyleServer((ids, [[*tokenizer.encode("d"), EOS]], [[-0.5, -0.5]], ["stop"]), tokenizer)
    session = ManagedServer(server)

    await session.completion(prompt="abc")
    await session.completion(prompt="abcd<|im_end|>e")

    nodes = session.get_state()["nodes"]
    assert [node.completion_ids.count(EOS) for node in nodes] == [1, 1]
    assert session.segments_restarted == 1


async def test_a_server_without_an_answer_is_an_error_not_an_empty_reply(tokenizer: Any) -> None:
    session = ManagedServer(UpstreamStyleServer(None, tokenizer))

    with pytest.raises(RolloutError, match="no answer to the prompt 'abc'"):
        await session.completion(prompt="abc")


async def test_a_server_without_tokens_names_the_variable_for_placeholders(tokenizer: Any) -> None:
    class TextServer:
        pass

    session = ManagedServer(TextServer(), tokenizer)

    with pytest.raises(NotImplementedError, match="ATROPOS_ALLOW_DUMMY_MANAGED_SERVER"):
        await session.chat_completion(messages=[USER])


async def test_without_a_tokenizer_the_error_says_so(caplog: pytest.LogCaptureFixture) -> None:
    class Bare:
        async def sample_tokens(self, **kwargs: Any) -> None: ...

    session = ManagedServer(Bare())

    assert session.tokenizer is None
    assert "has no tokenizer" in caplog.text
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        await session.chat_completion(messages=[USER])


# Logprobs of a given text


async def test_get_logprobs_asks_for_the_ids_of_the_session(tokenizer: Any) -> None:
    asked: list[dict[str, Any]] = []

    class Server(ScriptedServer):
        async def get_logprobs(self, **kwargs: Any) -> dict[str, Any]:
            asked.append(kwargs)
            return {"prompt_tokens": kwargs["input_ids"]}

    session = ManagedServer(Server(tokenizer, lambda prompt, index: "ok"), tokenizer)
    await session.chat_completion(messages=[USER])
    [node] = session.get_state()["nodes"]

    answer = await session.get_logprobs(messages=[USER, assistant("ok")], top_k=2)

    assert answer["prompt_tokens"] == [*node.tokens, *tokenizer.encode("\n", add_special_tokens=False)]
    assert asked[0]["top_k"] == 2
    assert session.get_state()["nodes"] == [node]


async def test_get_logprobs_of_a_server_that_has_none(tokenizer: Any) -> None:
    session = ManagedServer(ScriptedServer(tokenizer, lambda prompt, index: "ok"), tokenizer)

    with pytest.raises(NotImplementedError, match="does not implement get_logprobs"):
        await session.get_logprobs(prompt="abc")


async def test_requests_can_be_logged(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    session = ManagedServer(ScriptedServer(tokenizer, lambda prompt, index: "ok"), tokenizer)
    monkeypatch.setenv("ATROPOS_DEBUG_REQUESTS", "1")

    with caplog.at_level("INFO"):
        await session.chat_completion(messages=[USER])

    assert "replies=[('stop', 'ok')]" in caplog.text


async def test_a_test_harness_serves_a_session(tokenizer: Any) -> None:
    harness = ServerHarness()
    ids = [*tokenizer.encode("ok", add_special_tokens=False), EOS]
    harness.set_tokens_and_logprobs_response(
        "say ", tokenizer.encode("say "), [ids, ids], [[-0.5] * 3] * 2, ["stop"] * 2
    )
    session = ManagedServer(harness, tokenizer)

    answer = await session.completion(prompt="say ", n=2)

    assert [choice.text for choice in answer.choices] == ["ok", "ok"]
    assert answer.model == "test_model"
    assert [node.completion_ids for node in session.get_state()["nodes"]] == [ids, ids]
