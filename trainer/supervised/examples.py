"""Rows as examples: tokens, which of them are learnt, cut to length. What is left out is counted. No torch.

Shapes: L tokens of an example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError

from atroposlib.data.chats import tokenized
from atroposlib.data.trained_text import TrainedText
from atroposlib.errors import DataError
from atroposlib.type_definitions import MASKED, Message
from atroposlib.utils.tokenize_for_trainer import UNMASKED_ROLES

Row = Mapping[str, Any]
Tokenize = Callable[[Row], TrainedText]

_ANSWERED = ("completion", "messages", "conversations", "instruction", "text")
"""Columns of rows that have a reply to learn."""


@dataclass(frozen=True)
class Example:
    """One row as it is trained on."""

    tokens_L: npt.NDArray[np.int32]
    is_trained_L: npt.NDArray[np.bool_]
    """Never the first token: nothing comes before it."""
    messages: Sequence[Message] | None = None
    """The chat; None for plain text."""
    row: Row = field(default_factory=dict)
    """Where it comes from."""
    is_sampled: bool = False
    """The student's own completion, not the data's or the teacher's."""
    spans: Any = None
    """What a teacher with another tokenizer says; see span_scores."""

    @property
    def trained_tokens(self) -> int:
        """Tokens that are learnt."""
        return int(self.is_trained_L.sum())

    @property
    def prompt(self) -> npt.NDArray[np.int32]:
        """What stands before the last completion; everything where there is none."""
        return self.tokens_L[: self.last_completion_start]

    @property
    def last_completion_start(self) -> int:
        """Where the last run of learnt tokens begins; the length where there is none."""
        places = np.flatnonzero(self.is_trained_L)
        if not len(places):
            return len(self.tokens_L)
        gaps = np.flatnonzero(np.diff(places) > 1)
        return int(places[gaps[-1] + 1] if len(gaps) else places[0])


@dataclass(frozen=True)
class RowCounts:
    """What became of the rows."""

    rows: int = 0
    truncated: int = 0
    """Cut to max_seq_length."""
    prompt_too_long: int = 0
    """Left out: nothing of what is learnt is within max_seq_length."""
    nothing_to_train: int = 0
    """Left out: no token is learnt."""

    def as_metrics(self, prefix: str) -> dict[str, float]:
        """For metrics.jsonl."""
        return {
            f"{prefix}/rows": float(self.rows),
            f"{prefix}/truncated": float(self.truncated),
            f"{prefix}/prompt_too_long": float(self.prompt_too_long),
            f"{prefix}/nothing_to_train": float(self.nothing_to_train),
        }

    def __str__(self) -> str:
        parts = {
            "cut to max_seq_length": self.truncated,
            "left out, the prompt alone is too long": self.prompt_too_long,
            "left out, nothing to learn": self.nothing_to_train,
        }
        return ", ".join([f"{self.rows} rows", *(f"{count} {what}" for what, count in parts.items() if count)])


def row_tokenizer(
    tokenizer: Any, *, completion_only: bool, last_turn_only: bool, response_marker: str | None, takes_prompts: bool
) -> Tokenize:
    """What turns a row into tokens and masks.

    Args:
        completion_only: learn what the assistant says; else every token.
        last_turn_only: of its turns, the last one.
        response_marker: text before each reply; see atroposlib.data.chats.tokenized.
        takes_prompts: take rows that end before the reply, too: somebody will sample it.
    """

    def tokenize(row: Row) -> TrainedText:
        if takes_prompts and is_prompt_alone(row):
            return _prompt_text(row, tokenizer)
        text = tokenized(dict(row), tokenizer, trains_all_turns=not last_turn_only, response_marker=response_marker)
        return text if completion_only else TrainedText(text.tokens, list(text.tokens), text.messages)

    return tokenize


def is_prompt_alone(row: Row) -> bool:
    """Whether a row has a prompt and no completion, as rows for reinforcement learning do."""
    return "prompt" in row and not any(name in row for name in _ANSWERED)


def _prompt_text(row: Row, tokenizer: Any) -> TrainedText:
    prompt = row["prompt"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    ids = chat_prompt(prompt, tokenizer)
    return TrainedText(ids, [MASKED] * len(ids), list(prompt))


def chat_prompt(messages: Sequence[Message], tokenizer: Any) -> list[int]:
    """Ids of a chat up to where the reply begins.

    Raises:
        DataError: the chat template does not take it, or there is none.
    """
    try:
        return list(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        )
    except (TemplateError, ValueError, TypeError) as error:
        turns = ", ".join(str(message.get("role")) for message in messages)
        raise DataError(
            f"a prompt of {turns} cannot be rendered as a chat: {error}; mend the row, or give tokenizer_name_or_path of a "
            "tokenizer with a chat template that takes it"
        ) from error


def prepare(
    rows: Iterable[Row], tokenize: Tokenize, *, max_seq_length: int, takes_prompts: bool = False
) -> tuple[list[Example], RowCounts]:
    """Examples of rows, in their order.

    Args:
        max_seq_length: tokens of an example; what is longer loses its end.
        takes_prompts: keep examples without a learnt token where they are shorter than max_seq_length.
    Raises:
        DataError: a row is malformed (names it by its place), or not one row is left.
    """
    examples: list[Example] = []
    counts = RowCounts()
    for number, row in enumerate(rows):
        example = _example(row, number, tokenize)
        counts = replace(counts, rows=counts.rows + 1)
        kept = cut(example, max_seq_length)
        if not (kept.trained_tokens or (takes_prompts and len(example.tokens_L) < max_seq_length)):
            reason = "prompt_too_long" if len(example.tokens_L) >= max_seq_length else "nothing_to_train"
            counts = replace(counts, **{reason: getattr(counts, reason) + 1})
            continue
        counts = replace(counts, truncated=counts.truncated + (kept is not example))
        examples.append(kept)
    if counts.rows and not examples:
        raise DataError(f"not one row can be trained on: {counts}; see max_seq_length={max_seq_length}")
    return examples, counts


def cut(example: Example, max_seq_length: int) -> Example:
    """The example without what is beyond a length; itself where nothing is. A chat ends with the last reply that is left."""
    if len(example.tokens_L) <= max_seq_length:
        return example
    is_trained_L = example.is_trained_L[:max_seq_length]
    lost = _replies_learnt(example.is_trained_L) - _replies_learnt(is_trained_L)
    return replace(
        example,
        tokens_L=example.tokens_L[:max_seq_length],
        is_trained_L=is_trained_L,
        messages=_without_replies(example.messages, lost),
    )


def _replies_learnt(is_trained_L: npt.NDArray[np.bool_]) -> int:
    return int((np.diff(is_trained_L.astype(np.int8), prepend=0) == 1).sum())


def _without_replies(messages: Sequence[Message] | None, lost: int) -> Sequence[Message] | None:
    """The chat up to its last reply but `lost`."""
    if messages is None or not lost:
        return messages
    stops = [place for place, message in enumerate(messages, start=1) if message["role"] in UNMASKED_ROLES]
    return messages[: stops[-lost - 1]] if lost < len(stops) else []


def with_completion(example: Example, completion: Sequence[int], *, is_sampled: bool) -> Example:
    """The example's prompt with another completion."""
    prompt_L = example.prompt
    tokens_L = np.concatenate([prompt_L, np.asarray(completion, dtype=np.int32)])
    is_trained_L = np.arange(len(tokens_L)) >= len(prompt_L)
    return replace(example, tokens_L=tokens_L, is_trained_L=is_trained_L, is_sampled=is_sampled)


def _example(row: Row, number: int, tokenize: Tokenize) -> Example:
    try:
        text = tokenize(row)
    except DataError as error:
        raise DataError(f"row {number} of the data set: {error}") from error
    is_trained_L = np.array([mask != MASKED for mask in text.masks], dtype=np.bool_)
    is_trained_L[:1] = False
    return Example(np.array(text.tokens, dtype=np.int32), is_trained_L, text.messages, row)
