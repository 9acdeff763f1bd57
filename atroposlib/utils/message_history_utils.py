"""Shortens conversations that grow with every turn: thinking blocks, and whole turns of a trajectory."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

from atroposlib.utils.tokenize_for_trainer import tokenize_for_trainer

log = logging.getLogger(__name__)

_THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)
_BLOCK = re.compile(r"(?P<before>.*?<think>)(?P<thinking>.*?)(?P<after></think>.*|\Z)", re.DOTALL)
_PER_TOKEN = ("advantages", "ref_logprobs", "inference_logprobs", "policy_versions", "distill_token_ids", "distill_logprobs")  # fmt: skip


def strip_thinking(text: str) -> str:
    """The text without its `<think>...</think>` blocks."""
    return _THINKING.sub("", text).strip()


def truncate_thinking(response_text: str, tokenizer: Any, max_think_tokens: int) -> str:
    """Shorten the first thinking block to its last paragraph, or to its last tokens where even that is too long.

    Args:
        max_think_tokens: tokens of thinking to keep; the mark "... " of a cut comes on top.
    Returns:
        The text, unchanged where there is no thinking or it fits.
    """
    found = _BLOCK.fullmatch(response_text)
    thinking = found["thinking"].strip() if found else ""
    if found is None or len(_ids(tokenizer, thinking)) <= max_think_tokens:
        return response_text
    kept = _last_paragraph_or_tail(thinking, tokenizer, max_think_tokens)
    middle = f"\n... {kept}\n" if kept else "\n"
    return f"{found['before']}{middle}{found['after']}"


def ensure_trajectory_token_limit(trajectory: list[Any], tokenizer: Any, max_trajectory_tokens: int) -> list[Any]:
    """Make every step fit by leaving out its oldest turns.

    The system prompt, the last observation and the last reply stay. All alternatives of a step lose the same turns.
    Columns that belong to the old tokens (inference_logprobs and so on) become None in a shortened step.

    Args:
        trajectory: steps, each a group: messages, tokens and masks of its alternatives.
        max_trajectory_tokens: tokens of the longest alternative.
    Returns:
        The steps that fit; one that cannot be made to fit is left out, with a warning.
    """
    kept = []
    for index, step in enumerate(trajectory):
        fitting = _fit(step, tokenizer, max_trajectory_tokens)
        if fitting is None:
            log.warning("left out step %d: it does not fit in max_trajectory_tokens=%d", index, max_trajectory_tokens)
        else:
            kept.append(fitting)
    return kept


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _last_paragraph_or_tail(thinking: str, tokenizer: Any, max_tokens: int) -> str:
    paragraphs = [part for part in re.split(r"\n\s*\n", thinking) if part.strip()]
    last = paragraphs[-1].strip()
    if len(_ids(tokenizer, last)) <= max_tokens:
        return last
    tail = _ids(tokenizer, thinking)[-max_tokens:] if max_tokens > 0 else []
    return str(tokenizer.decode(tail)).strip()


def _fit(step: Any, tokenizer: Any, limit: int) -> Any | None:
    if max((len(row) for row in step["tokens"]), default=0) <= limit:
        return step
    histories = [list(messages) for messages in step.get("messages") or []]
    while all(_droppable(messages) for messages in histories) and histories:
        histories = [_without_oldest_turn(messages) for messages in histories]
        columns = [tokenize_for_trainer(tokenizer, messages) for messages in histories]
        if max(len(column["tokens"]) for column in columns) <= limit:
            return {
                **step,
                **{name: None for name in _PER_TOKEN if name in step},
                "messages": histories,
                "tokens": [column["tokens"] for column in columns],
                "masks": [column["masks"] for column in columns],
            }
    return None


def _n_system(messages: Sequence[Any]) -> int:
    return int(bool(messages) and messages[0]["role"] == "system")


def _droppable(messages: Sequence[Any]) -> bool:
    """Whether anything stands between the system prompt and the last observation with its reply."""
    return len(messages) - _n_system(messages) > 2


def _without_oldest_turn(messages: list[Any]) -> list[Any]:
    """Drop an observation with its reply, or the single oldest message where only three are left."""
    first = _n_system(messages)
    n_dropped = 2 if len(messages) - first > 3 else 1
    return messages[:first] + messages[first + n_dropped :]
