"""Sessions with the tokenizer and the chat template of a real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from atroposlib.envs.server_handling.managed_server import ManagedServer
from atroposlib.envs.tokenizers import load_tokenizer
from tests.envs.session_fakes import EOS, ScriptedServer

MODEL = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct"

pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason="the demo model is not there: run make demo")

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
CALL = '<tool_call>\n{"name": "add",  "arguments": {"a": 1}}\n</tool_call>'


class Letters:
    """Samples letter by letter, as no tokenizer would encode the text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str, **options: Any) -> list[int]:
        return [token for letter in text for token in self._tokenizer.encode(letter, **options)]


@pytest.fixture(scope="module")
def smol() -> Any:
    return load_tokenizer(str(MODEL))


async def test_unusual_tokens_are_kept_over_turns(smol: Any) -> None:
    session = ManagedServer(ScriptedServer(Letters(smol), lambda prompt, index: "hello there"), smol)
    messages: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]

    for _ in range(3):
        answer = await session.chat_completion(messages=messages)
        messages += [
            {"role": "assistant", "content": answer.choices[0].message.content},
            {"role": "user", "content": " and?\n"},
        ]

    [node] = session.get_state()["nodes"]
    sampled = [*Letters(smol).encode("hello there"), EOS]
    assert node.completion_ids == sampled * 3
    rendered = smol.apply_chat_template(messages[:-1], tokenize=False)
    assert smol.decode(node.tokens) + "\n" == rendered
    assert node.tokens != smol.encode(rendered)[: len(node.tokens)]


async def test_tool_calls_are_kept_over_turns(smol: Any) -> None:
    server = ScriptedServer(Letters(smol), lambda prompt, index: CALL if "tool\n" not in prompt else "2")
    session = ManagedServer(server, smol, tool_parser="hermes")
    messages: list[Any] = [{"role": "user", "content": "1 + 1?"}]

    first = await session.chat_completion(messages=messages, tools=TOOLS)
    calls: Any = first.choices[0].message.tool_calls
    messages += [first.choices[0].message, {"role": "tool", "tool_call_id": calls[0]["id"], "content": "2"}]
    second = await session.chat_completion(messages=messages, tools=TOOLS)

    [node] = session.get_state()["nodes"]
    assert (first.choices[0].finish_reason, second.choices[0].finish_reason) == ("tool_calls", "stop")
    assert smol.decode(node.completion_ids) == f"{CALL}<|im_end|>2<|im_end|>"
    assert session.segments_restarted == 0
