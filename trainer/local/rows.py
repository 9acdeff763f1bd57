"""The user's rows: what one must hold, and the order in which they are taken."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count, islice
from typing import Any, TypeAlias

from atroposlib.errors import ConfigError

Row: TypeAlias = Mapping[str, Any]
Rows: TypeAlias = Iterable[Row]
"""A list, a datasets.Dataset, or anything else that gives rows when it is iterated, again and again."""

EXAMPLE = '{"prompt": "2 + 3 =", "answer": 5}'


def check_rows(rows: Any, name: str) -> None:
    """Look at what can be seen of a data set without going through it.

    Raises:
        ConfigError: it is no data set, it is empty, or its first row has no prompt.
    """
    if isinstance(rows, str | Mapping) or not isinstance(rows, Iterable):
        raise ConfigError(
            f"{name} is a {type(rows).__name__}, expected rows such as [{EXAMPLE}, ...] or a datasets.Dataset; "
            "of several splits give one"
        )
    if is_indexed(rows):
        if len(rows) == 0:  # type: ignore[arg-type]
            raise ConfigError(f"{name} has no rows; give at least one, such as {EXAMPLE}")
        checked_row(rows[0], 0, name)  # type: ignore[index]


def is_indexed(rows: object) -> bool:
    """Whether rows can be taken in any order."""
    return hasattr(rows, "__len__") and hasattr(rows, "__getitem__")


def checked_row(row: Any, number: int, name: str = "train_dataset") -> Row:
    """The row.

    Raises:
        ConfigError: it has no prompt, or the prompt is neither text nor messages.
    """
    if not isinstance(row, Mapping) or "prompt" not in row:
        has = f"has {', '.join(map(str, row)) or 'nothing'}" if isinstance(row, Mapping) else f"is {row!r:.80}"
        raise ConfigError(f'row {number} of {name} {has}; every row needs a "prompt", as in {EXAMPLE}')
    prompt = row["prompt"]
    is_text = isinstance(prompt, str) and bool(prompt)
    if not is_text and not is_conversation(prompt):
        raise ConfigError(
            f"the prompt of row {number} of {name} is {prompt!r:.80}; expected a text, or messages such as "
            '[{"role": "user", "content": "2 + 3 ="}]'
        )
    return row


def is_conversation(prompt: Any) -> bool:
    """Whether a prompt is a list of messages."""
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and bool(prompt)
        and all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in prompt)
    )


def columns_of(row: Row) -> dict[str, Any]:
    """What a reward function is told of a row beside prompts and completions."""
    return {key: value for key, value in row.items() if key not in ("prompt", "completion", "completion_ids")}


def endless_rows(rows: Rows, *, seed: int, start: int = 0) -> Iterator[Row]:
    """The rows, epoch after epoch, in an order that the seed decides; what cannot be indexed keeps its own order.

    Args:
        start: rows that were taken before; the order is that of a run which was never interrupted.
    Raises:
        ConfigError: a row has no prompt, or there are no more rows.
    """
    if is_indexed(rows):
        yield from _shuffled(rows, seed=seed, start=start)
    yield from islice(_repeated(rows), start, None)


def _shuffled(rows: Any, *, seed: int, start: int) -> Iterator[Row]:
    size = len(rows)
    for epoch in count(start // size):
        order = list(range(size))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        first = start % size if epoch == start // size else 0
        for index in order[first:]:
            yield checked_row(rows[index], index)


def _repeated(rows: Rows) -> Iterator[Row]:
    while True:
        number = -1
        for number, row in enumerate(rows):
            yield checked_row(row, number)
        if number < 0:
            raise ConfigError(
                "train_dataset has no more rows, and training goes on; give a list or a data set that can be iterated "
                "again instead of an iterator, or lower max_steps"
            )
