"""Turns a finished chat into the tokens and masks that a trainer takes.

For rollouts prefer ServerManager.managed_server: it keeps the ids that the engine sampled. This renders and tokenises
the text again, which is right for chats that no engine of ours sampled: SFT data, judges' answers, other APIs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from atroposlib.errors import ConfigError
from atroposlib.type_definitions import MASKED
from atroposlib.utils.chat_tokens import as_messages, chat_token_ids, shared_prefix_length
from atroposlib.utils.tokenize_for_trainer_dpo import tokenize_for_trainer_dpo

UNMASKED_ROLES = ["assistant", "agent"]
"""Roles whose turns the policy speaks."""


def tokenize_for_trainer(
    tokenizer: Any,
    chat: Sequence[Any],
    include_messages: bool = False,
    train_on_all_assistant_turns: bool = False,
    finish_reason: str = "",
) -> dict[str, Any]:
    """Tokens of the whole chat; the mask repeats the ids of what is trained and is -100 elsewhere.

    Args:
        tokenizer: anything with apply_chat_template.
        chat: messages, the last of them the reply to train on.
        train_on_all_assistant_turns: train every turn of UNMASKED_ROLES instead of the last message alone.
        finish_reason: "length" means that the reply was cut: the end-of-turn token that the template adds is dropped.
    Returns:
        {"tokens": [T] ids, "masks": [T], and "messages": the chat where include_messages is set}.
    Raises:
        ConfigError: the chat is empty, or the template renders earlier turns differently once later ones follow, so
            that no part of the tokens can be called the reply.
    """
    messages = as_messages(chat)
    if not messages:
        raise ConfigError("tokenize_for_trainer got an empty chat; it needs at least the reply to train on")
    tokens = chat_token_ids(tokenizer, messages)
    turns = _trained_turns(messages) if train_on_all_assistant_turns else [len(messages) - 1]
    masks = [MASKED] * len(tokens)
    for turn in turns:
        start, end = _span(tokenizer, messages, tokens, turn)
        masks[start:end] = tokens[start:end]
    if finish_reason == "length":
        kept = _without_terminator(tokenizer, tokens, masks)
        tokens, masks = tokens[:kept], masks[:kept]
    result: dict[str, Any] = {"tokens": tokens, "masks": masks}
    if include_messages:
        result["messages"] = chat
    return result


def _trained_turns(messages: Sequence[dict[str, Any]]) -> list[int]:
    return [index for index, message in enumerate(messages) if message.get("role") in UNMASKED_ROLES]


def _span(tokenizer: Any, messages: list[dict[str, Any]], tokens: list[int], turn: int) -> tuple[int, int]:
    """Where a turn begins (after its role header) and ends among the chat's tokens."""
    prompt = chat_token_ids(tokenizer, messages[:turn], add_generation_prompt=True)
    # Not simply len(prompt): the reply's first characters may merge with the header's last token, and templates of
    # reasoning models open a <think> block in the prompt that a finished turn does not have.
    start = shared_prefix_length(prompt, tokens)
    is_last = turn == len(messages) - 1
    history = chat_token_ids(tokenizer, messages[:turn]) if turn and start < len(prompt) else []
    upto = tokens if is_last else chat_token_ids(tokenizer, messages[: turn + 1])
    if tokens[: len(history)] != history or tokens[: len(upto)] != upto:
        raise ConfigError(
            f"the chat template of {getattr(tokenizer, 'name_or_path', type(tokenizer).__name__)!r} renders the turns "
            f"up to message {turn} differently once later messages follow (many reasoning models drop earlier "
            "thinking), so the trained tokens cannot be found; make one sequence for each turn, sample with "
            "managed_server, or use a template that keeps history as it was"
        )
    return start, len(upto)


def _without_terminator(tokenizer: Any, tokens: Sequence[int], masks: Sequence[int]) -> int:
    """Length of the tokens without the end-of-turn token and the blanks that the template puts after it."""
    terminators = {getattr(tokenizer, "eos_token_id", None), *(getattr(tokenizer, "all_special_ids", None) or ())}
    end = len(tokens)
    while end and tokens[end - 1] not in terminators:
        if tokenizer.decode([tokens[end - 1]]).strip():
            return len(tokens)
        end -= 1
    return end - 1 if end and masks[end - 1] != MASKED else len(tokens)


__all__ = ["UNMASKED_ROLES", "tokenize_for_trainer", "tokenize_for_trainer_dpo"]
