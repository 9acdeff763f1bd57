"""Supervised rows as chats: the five forms that data sets come in, and their tokens with what is trained of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from jinja2 import TemplateError

from atroposlib.data.marked_text import trained_after_markers
from atroposlib.data.registry import Row
from atroposlib.data.template_masks import has_generation_spans, tokens_and_masks
from atroposlib.data.trained_text import TrainedText
from atroposlib.data.turn_ends import is_closed
from atroposlib.errors import DataError
from atroposlib.type_definitions import Message
from atroposlib.utils.tokenize_for_trainer import UNMASKED_ROLES, tokenize_for_trainer

EXPECTED = (
    '{"messages": [{"role": ..., "content": ...}, ...]}, {"prompt": ..., "completion": ...}, {"text": ...}, '
    '{"conversations": [{"from": ..., "value": ...}, ...]} or {"instruction": ..., "input": ..., "output": ...}'
)
ROLES_OF_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""Role of each `from` in conversations."""


def as_messages(row: Mapping[str, Any]) -> list[Message]:
    """A row of any of the five forms as a chat; plain text becomes one message of the role `text`.

    The forms are looked for in the order messages, conversations, prompt with completion, instruction with output, text.

    Raises:
        DataError: the row has none of the forms, or a message is not as it should be; says what was expected.
    """
    if "messages" in row:
        return _messages(row["messages"], "messages")
    if "conversations" in row:
        return _conversations(row["conversations"])
    if "completion" in row:
        return _turns(prompt_of(row), "user") + _turns(row["completion"], "assistant", needs_text=True)
    if "instruction" in row and "output" in row:
        return _instruction(row)
    if isinstance(row.get("text"), str) and row["text"]:
        return [{"role": "text", "content": row["text"]}]
    raise DataError(f"columns {', '.join(map(repr, row)) or 'none'}: expected {EXPECTED}")


def prompt_of(row: Mapping[str, Any]) -> Any:
    """What comes before the completion; `prefix` is what atropos-sft-gen writes."""
    return row["prompt"] if "prompt" in row else row.get("prefix", "")


def tokenized(
    row: Row, tokenizer: Any, *, trains_all_turns: bool = True, response_marker: str | None = None
) -> TrainedText:
    """Tokens and masks of a row. The end of every trained turn is trained too.

    Of chats the turns of the assistant are trained, of a prompt (text) with its completion the completion, of plain text
    all of it. The trained spans of a chat are those that its template marks as generated, else what each turn of the
    assistant adds to the rendered chat.

    Args:
        trains_all_turns: train every turn of the assistant; else the last one alone.
        response_marker: text that stands right before each reply, once rendered. What follows is trained, up to the
            end-of-turn token. For plain text, and for templates that render earlier turns differently later.
    Raises:
        DataError: the row has none of the five forms, nothing of it can be trained, or the chat template refuses it.
        ConfigError: the chat template changes earlier turns when later ones follow, so that only a marker can help.
    """
    messages = as_messages(row)
    if messages[0]["role"] == "text":
        text = _end_added(str(messages[0]["content"]), tokenizer)
        return _plain_text(text, tokenizer, response_marker, trains_all_turns=trains_all_turns)
    if "completion" in row and isinstance(row["completion"], str) and isinstance(prompt_of(row), str):
        return _completion(prompt_of(row), row["completion"], tokenizer)
    chat = _up_to_the_last_reply(messages)
    try:
        return TrainedText(*_chat_tokens(chat, tokenizer, response_marker, trains_all_turns=trains_all_turns), chat)
    except (TemplateError, ValueError, TypeError) as error:
        turns = ", ".join(message["role"] for message in chat)
        raise DataError(
            f"the chat template refuses a chat of {turns}: {error}; mend the row (most templates want user and assistant "
            "in turn, the user first), or use a template that takes it"
        ) from error


def _chat_tokens(
    chat: list[Message], tokenizer: Any, marker: str | None, *, trains_all_turns: bool
) -> tuple[list[int], list[int]]:
    if marker is not None:
        rendered = str(tokenizer.apply_chat_template(chat, tokenize=False))
        marked = trained_after_markers(rendered, tokenizer, marker, all_markers=trains_all_turns)
        return marked.tokens, marked.masks
    if has_generation_spans(tokenizer):
        n_replies = sum(message["role"] in UNMASKED_ROLES for message in chat)
        found = tokens_and_masks(chat, tokenizer, n_replies=n_replies, last_only=not trains_all_turns)
        if found is not None:
            return found
    added = tokenize_for_trainer(tokenizer, chat, train_on_all_assistant_turns=trains_all_turns)
    return added["tokens"], added["masks"]


def _completion(prompt: str, completion: str, tokenizer: Any) -> TrainedText:
    before = list(tokenizer.encode(prompt, add_special_tokens=True))
    trained = list(tokenizer.encode(completion, add_special_tokens=False))
    # Without its end the policy would learn to go on for ever.
    if tokenizer.eos_token_id is not None and not is_closed(trained, tokenizer):
        trained.append(tokenizer.eos_token_id)
    return TrainedText.after_prompt(before, trained)


def _plain_text(text: str, tokenizer: Any, marker: str | None, *, trains_all_turns: bool) -> TrainedText:
    if marker is not None:
        return trained_after_markers(text, tokenizer, marker, all_markers=trains_all_turns)
    return TrainedText.after_prompt([], list(tokenizer.encode(text, add_special_tokens=True)))


def _end_added(text: str, tokenizer: Any) -> str:
    end = getattr(tokenizer, "eos_token", None)
    return text if not end or text.rstrip().endswith(end) else text + end


def _up_to_the_last_reply(messages: list[Message]) -> list[Message]:
    """The chat without what follows its last trained turn: it would not be trained, nor change what is."""
    replies = [number for number, message in enumerate(messages, start=1) if message["role"] in UNMASKED_ROLES]
    if not replies:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"a chat of {roles} has nothing to train on; it needs a turn of the assistant")
    return messages[: replies[-1]]


def _messages(value: Any, column: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{column!r} is {_shown(value)}; expected a list of messages, not empty")
    for number, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"message {number} of {column!r} is {_shown(message)}; expected role and content")
        content = message.get("content")
        # A call of tools may come without text.
        if not isinstance(content, (str, list)) and not (content is None and message.get("tool_calls")):
            raise DataError(f"content of message {number} of {column!r} is {_shown(content)}; expected text or parts")
    return cast(list[Message], value)


def _conversations(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise DataError(f"'conversations' is {_shown(value)}; expected a list of turns with from and value, not empty")
    return [_turn_of_speaker(turn, number) for number, turn in enumerate(value)]


def _turn_of_speaker(turn: Any, number: int) -> Message:
    speaker = turn.get("from") if isinstance(turn, dict) else None
    role = ROLES_OF_SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        known = ", ".join(ROLES_OF_SPEAKERS)
        raise DataError(f"turn {number} of 'conversations' is from {_shown(speaker)}; known are {known}")
    if not isinstance(turn.get("value"), str):
        raise DataError(f"'value' of turn {number} of 'conversations' is {_shown(turn.get('value'))}; expected text")
    return {"role": role, "content": turn["value"]}


def _turns(value: Any, role: str, *, needs_text: bool = False) -> list[Message]:
    """A prompt or a completion, as text or as messages."""
    column = "completion" if needs_text else "prompt"
    if isinstance(value, list):
        return _messages(value, column)
    if not isinstance(value, str) or (needs_text and not value):
        raise DataError(f"{column!r} is {_shown(value)}; expected text or a list of messages")
    return [{"role": role, "content": value}] if value else []


def _instruction(row: Mapping[str, Any]) -> list[Message]:
    parts = [row["instruction"], row.get("input") or ""]
    if (
        not all(isinstance(part, str) for part in [*parts, row["output"]])
        or not row["instruction"]
        or not row["output"]
    ):
        raise DataError(
            f"instruction is {_shown(row['instruction'])}, input {_shown(row.get('input'))} and output "
            f"{_shown(row['output'])}; expected text (input may be empty)"
        )
    question = "\n\n".join(part for part in parts if part)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
