"""Answers of a session as objects of the openai package; import it where one is built, the package is slow to load."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from openai.types import Completion, CompletionChoice
from openai.types.chat import ChatCompletion, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice

_FINISH_REASONS = ("stop", "length", "tool_calls", "content_filter")


# The fields differ from their parents' on purpose: environments read tool calls as plain dicts, and the objects must
# still dump themselves without warnings.
class PlainMessage(ChatCompletionMessage):
    """A reply whose tool calls are plain dicts."""

    tool_calls: list[dict[str, Any]] | None = None  # type: ignore[assignment]


class PlainChoice(Choice):
    """A choice with such a reply."""

    message: PlainMessage


class PlainChatCompletion(ChatCompletion):
    """A chat answer with such choices."""

    choices: list[PlainChoice]  # type: ignore[assignment]


def chat_choice(
    index: int, content: str | None, tool_calls: list[dict[str, Any]] | None, finish_reason: str
) -> PlainChoice:
    """One reply to a chat."""
    return PlainChoice(
        index=index,
        finish_reason=_openai_finish_reason(finish_reason),
        message=PlainMessage(role="assistant", content=content, tool_calls=tool_calls),
    )


def chat_answer(choices: Sequence[PlainChoice], model: str) -> ChatCompletion:
    """The answer to a chat request."""
    return PlainChatCompletion(
        id=_answer_id(), created=int(time.time()), model=model, object="chat.completion", choices=list(choices)
    )


def completion_answer(texts: Sequence[str], finish_reasons: Sequence[str], model: str) -> Completion:
    """The answer to a text completion request."""
    choices = [
        CompletionChoice(index=i, text=text, finish_reason=_openai_finish_reason(reason))
        for i, (text, reason) in enumerate(zip(texts, finish_reasons, strict=True))
    ]
    return Completion(id=_answer_id(), created=int(time.time()), model=model, object="text_completion", choices=choices)


def _openai_finish_reason(finish_reason: str) -> Any:
    return finish_reason if finish_reason in _FINISH_REASONS else "stop"


def _answer_id() -> str:
    return f"managed-{uuid.uuid4().hex}"
