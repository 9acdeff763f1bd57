"""Between tool calls as objects and as the text that the model wrote, without losing a character of it."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from atroposlib.envs.server_handling.sessions.chat_messages import with_parsed_arguments
from atroposlib.envs.server_handling.tool_parsers import FunctionCall, ToolCallFormatError, tool_parser
from atroposlib.envs.server_handling.tool_parsers.hermes import parse_hermes

log = logging.getLogger(__name__)

VLLM_AVAILABLE = find_spec("vllm") is not None
"""Whether vLLM is installed here; the parsers are our own and do not need it."""


@dataclass(frozen=True)
class ToolCall:
    """One call with the id that its answer will name."""

    id: str
    function: FunctionCall
    type: str = "function"


def call_as_dict(call: Any) -> dict[str, Any]:
    """The form of the OpenAI API; of any object with a ToolCall's fields."""
    function = {"name": call.function.name, "arguments": call.function.arguments}
    return {"id": call.id, "type": "function", "function": function}


class ToolCallTranslator:
    """Parses replies, and turns their tool calls back into the exact text they came from.

    Args:
        tokenizer: decodes what the engine sampled.
        parser_name: format of the model's calls, see tool_parsers.
    Raises:
        ConfigError: there is no such parser.
    """

    def __init__(self, tokenizer: Any, parser_name: str = "hermes") -> None:
        self.tokenizer = tokenizer
        self.parser_name = parser_name
        self.call_id_to_raw_text: dict[str, str] = {}
        self.broken_replies = 0
        """Replies that began a tool call and broke its format; they stay text."""
        self._parse = tool_parser(parser_name)

    def parse_model_output(
        self, raw_text: str, tool_choice: Any = None, tools: Sequence[dict[str, Any]] | None = None
    ) -> tuple[str | None, list[ToolCall] | None, str]:
        """Content, calls or None, finish reason; a reply in a broken format is all content.

        Args:
            tool_choice: "none" leaves the text alone.
            tools: the tools offered; without any the text is left alone.
        """
        if tool_choice == "none" or not tools:
            return raw_text, None, "stop"
        try:
            reply = self._parse(raw_text, tools)
        except ToolCallFormatError as error:
            self.broken_replies += 1
            log.debug("broken tool call, kept as text: %s", error)
            return raw_text, None, "stop"
        if not reply.calls:
            return raw_text, None, "stop"
        calls = [ToolCall(id=self._new_id(), function=function) for function in reply.calls]
        self.call_id_to_raw_text.update((call.id, raw_text) for call in calls)
        return reply.content, calls, "tool_calls"

    def reconstruct_raw_text_from_tool_calls(self, tool_calls: Sequence[dict[str, Any]]) -> str:
        """What the model wrote where the first call's id is known, else Hermes lines."""
        if not tool_calls:
            return ""
        raw_text = self._sampled_text(tool_calls)
        return "\n".join(map(_hermes_line, tool_calls)) if raw_text is None else raw_text

    def convert_messages_for_template(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Assistant turns with tool calls as the text that was sampled; the other turns unchanged.

        Calls that nobody sampled here (few-shot examples) become Hermes text where the model speaks Hermes; other
        models' templates know better how to write theirs.
        """
        return [self._converted(message) for message in messages]

    def decode_with_tool_awareness(self, token_ids: list[int], has_tools: bool = False) -> str:
        """Text of sampled tokens; with tools the special tokens stay, for some formats are made of them."""
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=not has_tools)
        return text

    def _converted(self, message: dict[str, Any]) -> dict[str, Any]:
        calls = message.get("tool_calls")
        if message.get("role") != "assistant" or not calls:
            return message
        raw_text = self._sampled_text(calls)
        if raw_text is None:
            if self._parse is not parse_hermes:
                return with_parsed_arguments(message)
            content = message.get("content") or ""
            raw_text = "\n".join([*([content] if content else []), *map(_hermes_line, calls)])
        rest = {name: value for name, value in message.items() if name != "tool_calls"}
        return {**rest, "content": raw_text}

    def _sampled_text(self, tool_calls: Sequence[dict[str, Any]]) -> str | None:
        return self.call_id_to_raw_text.get(tool_calls[0].get("id", ""))

    def _new_id(self) -> str:
        # Nine letters and digits are what Mistral's templates insist on.
        return uuid.uuid4().hex[:9] if self.parser_name == "mistral" else f"call_{uuid.uuid4().hex}"


def _hermes_line(tool_call: dict[str, Any]) -> str:
    function = tool_call["function"]
    arguments = function.get("arguments", {})
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        log.debug("arguments that are not JSON are written as a string: %r", arguments)
    return (
        f"<tool_call>{json.dumps({'name': function['name'], 'arguments': arguments}, ensure_ascii=False)}</tool_call>"
    )
