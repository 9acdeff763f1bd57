"""Best of n, tool calls in text, HTTP answers, tokenizers with changed templates, diverse samples."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.testing.byte_tokenizer import save_byte_tokenizer
from atroposlib.utils.best_of_n_selection import select_best_index
from atroposlib.utils.force_diverse_samples import generate_with_diverse_first_tokens
from atroposlib.utils.io import parse_http_response
from atroposlib.utils.tokenizers.qwen_fixed_tokenizer import QwenFixedTokenizer
from atroposlib.utils.tool_call_parser import extract_tool_call, parse_tool_call

TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "say"}}, {"name": "look"}]


# Best of n


@pytest.mark.parametrize(
    ("primary", "secondary", "options", "best"),
    [
        ([1, 3, 2], [0, 0, 0], {}, 1),
        ([3, 3, 3], [5, 2, 2], {}, 1),  # ties: the secondary, then the earlier
        ([1, 3, 2], [0, 0, 0], {"primary_higher_is_better": False}, 0),
        ([3, 3], [5, 2], {"secondary_lower_is_better": False}, 0),
    ],
)
def test_the_best_primary_then_secondary_then_earliest(
    primary: list[float], secondary: list[float], options: dict[str, bool], best: int
) -> None:
    assert select_best_index(primary, secondary, **options) == best


@pytest.mark.parametrize(("primary", "secondary"), [([], []), ([1.0], [])])
def test_a_choice_needs_both_scores_of_someone(primary: list[float], secondary: list[float]) -> None:
    with pytest.raises(ValueError, match="select_best_index needs"):
        select_best_index(primary, secondary)


# Tool calls


def call(body: str, tag: str = "tool_call") -> str:
    return f"<think>hm</think>\n<{tag}>\n{body}\n</{tag}>"


@pytest.mark.parametrize(
    "body",
    [
        '{"name": "say", "arguments": {"text": "it\'s"}}',
        "{'name': 'say', 'arguments': {'text': \"it's\"}}",
        '{"name": "say", "arguments": "{\\"text\\": \\"it\'s\\"}"}',
    ],
)
def test_an_apostrophe_in_an_argument_survives(body: str) -> None:
    assert parse_tool_call(call(body), TOOLS) == ("say", {"text": "it's"}, False)


def test_json_in_single_quotes_is_read() -> None:
    assert parse_tool_call(call("{'name': 'look', 'arguments': {'far': true}}")) == ("look", {"far": True}, False)


@pytest.mark.parametrize(
    "response",
    [
        "no call",
        call("not json"),
        call('["say"]'),
        call('{"arguments": {}}'),
        call('{"name": "fly", "arguments": {}}'),
        call('{"name": "say", "arguments": [1]}'),
    ],
)
def test_what_is_no_call_of_a_tool_is_an_error(response: str) -> None:
    assert parse_tool_call(response, TOOLS) == ("-ERROR-", {}, True)


def test_preferred_tags_come_first() -> None:
    text = call('{"name": "look"}') + call('{"name": "say"}', tag="action")

    assert parse_tool_call(text, TOOLS, ["action"]) == ("say", {}, False)
    assert parse_tool_call(text, TOOLS) == ("look", {}, False)
    assert extract_tool_call("nothing") is None


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3))


@given(arguments=st.dictionaries(st.text(), JSON, max_size=3))
def test_a_well_formed_call_is_read_whatever_its_arguments(arguments: dict[str, Any]) -> None:
    body = json.dumps({"name": "say", "arguments": arguments}).replace("<", "\\u003c")

    assert parse_tool_call(call(body), TOOLS) == ("say", arguments, False)


# HTTP answers


@pytest.fixture
async def url() -> AsyncIterator[str]:
    app = web.Application()

    bodies = {"good": ('{"a": 1}', 200), "refused": ("the reason", 500), "broken": ("{not json", 200)}

    async def answer(request: web.Request) -> web.Response:
        body, status = bodies[request.match_info["name"]]
        return web.Response(text=body, status=status, content_type="application/json")

    app.router.add_get("/{name}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def test_a_json_answer_is_parsed(url: str) -> None:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/good") as response:
        assert await parse_http_response(response) == {"a": 1}


@pytest.mark.parametrize(
    ("path", "error", "body"),
    [("refused", aiohttp.ClientResponseError, "the reason"), ("broken", ValueError, "{not json")],
)
async def test_the_body_of_an_unusable_answer_is_logged(
    url: str, path: str, error: type[Exception], body: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/{path}") as response:
        with caplog.at_level(logging.ERROR, logger="mine"), pytest.raises(error):
            await parse_http_response(response, logging.getLogger("mine"))

    assert body in caplog.text


# Tokenizers


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> QwenFixedTokenizer:
    return QwenFixedTokenizer(save_byte_tokenizer(tmp_path_factory.mktemp("qwen")))


def test_a_conversation_that_goes_on_keeps_its_tokens(qwen: QwenFixedTokenizer) -> None:
    start = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"}]
    later = [*start, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]

    rendered = qwen.apply_chat_template(later, tokenize=False)

    assert rendered.startswith(qwen.apply_chat_template(start, tokenize=False, add_generation_prompt=False))
    assert rendered == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\nhm\n</think>\n\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>\n"
    )


def test_tools_calls_and_their_results_are_rendered(qwen: QwenFixedTokenizer) -> None:
    look = {"name": "look", "arguments": {"far": True}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "go"}]},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": look}]},
        {"role": "tool", "content": "a tree"},
        {"role": "tool", "content": "a bush"},
    ]

    text = qwen.apply_chat_template(messages, tools=TOOLS, tokenize=False, add_generation_prompt=True)

    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n")
    assert f"<tools>\n{json.dumps(TOOLS[0])}\n{json.dumps(TOOLS[1])}\n</tools>" in text
    assert text.endswith(
        "<|im_start|>user\ngo<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "look", "arguments": {"far": true}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\na tree\n</tool_response>\n<tool_response>\na bush\n</tool_response>"
        "<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_rest_is_the_tokenizer_s(qwen: QwenFixedTokenizer) -> None:
    assert qwen.decode(qwen("abc")["input_ids"]) == "abc"
    assert len(qwen) == 259
    assert qwen.eos_token == "<|im_end|>"


# Diverse samples


class FakeServer:
    """Knows the likeliest first letters; goes on with "!"."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.asked: list[dict[str, Any]] = []

    async def get_logprobs(self, *, input_ids: list[int], top_k: int, max_tokens: int) -> dict[str, Any]:
        row = [self.tokenizer.encode(letter)[0] for letter in "bac"]
        return {
            "prompt_tokens": input_ids,
            "prompt_topk_token_ids": [[] for _ in input_ids[1:]] + [row],
            "prompt_topk_logprobs": [[] for _ in input_ids[1:]] + [[-2.0, -1.0, -3.0]],
        }

    async def tokens_and_logprobs_completion(self, **kwargs: Any) -> Any:
        self.asked.append(kwargs)
        return kwargs["input_ids"], [self.tokenizer.encode("!")], [[-0.1]], ["stop"]


async def test_replies_begin_with_the_likeliest_tokens(tokenizer: Any) -> None:
    env = type("Env", (), {"server": FakeServer(tokenizer), "tokenizer": tokenizer})()
    messages = [{"role": "user", "content": "go"}]

    replies = await generate_with_diverse_first_tokens(env, messages, prefill="So ", n=2, max_tokens=5)

    assert replies == ["a!", "b!"]
    assert tokenizer.decode(env.server.asked[0]["input_ids"]).endswith("<|im_start|>assistant\nSo a")
    assert env.server.asked[0]["max_tokens"] == 4
