"""Rows of a data set: read from a file or the Hugging Face hub, checked, split and shuffled the same way by every environment."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from atroposlib.data.entries import Entry
from atroposlib.data.files import is_file_name, read_file
from atroposlib.data.hub import read_hub
from atroposlib.data.registry import Row
from atroposlib.data.splitting import fraction
from atroposlib.errors import ConfigError

T = TypeVar("T")


def load_rows(source: str | Path, *, fields: Mapping[str, type], split: str = "train") -> list[Row]:
    """Every row of a data set, in its order.

    Args:
        source: path of a file (lines of JSON, plain, .gz or .xz; a JSON list; Parquet), or `owner/name` on the hub,
            `owner/name:config` where it has several configurations.
        fields: name and type of what each row must hold; further fields are kept. `float` takes whole numbers too.
        split: of a hub data set; a file has none.
    Raises:
        ConfigError: there is no such file or data set, or a row is not as promised; names the line.
    """
    is_file = isinstance(source, Path) or Path(source).exists() or is_file_name(source)
    entries = read_file(Path(source)) if is_file else _of_hub(str(source), split)
    found: list[Row] = []
    for entry in entries:
        if entry.row is None or (problem := _problem(entry.row, fields)) is not None:
            raise ConfigError(f"{entry.place}: {entry.problem or problem}")
        found.append(entry.row)
    if not found:
        raise ConfigError(f"{source} holds no rows; each line must be a JSON object with {', '.join(fields)}")
    return found


def held_out(rows: Sequence[Row], share: float, key: str | Callable[[Row], Any]) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows, split by a hash of what tells them apart.

    A row stays on its side when others are added, and rows with the same key are never on both.

    Args:
        share: of the keys, 0 to 1, that are held out; approximate.
        key: the field that tells rows apart, such as the question, or a function of the row.
    Raises:
        ConfigError: share is out of range, or one side is empty.
    """
    if not 0 < share < 1:
        raise ConfigError(f"the held-out share must lie between 0 and 1, not {share}")
    train: list[Row] = []
    test: list[Row] = []
    for row in rows:
        value = row[key] if isinstance(key, str) else key(row)
        (test if fraction(value) < share else train).append(row)
    if not train or not test:
        raise ConfigError(
            f"a held-out share of {share} leaves {len(train)} rows to train on and {len(test)} to evaluate; "
            "change it, or use more rows"
        )
    return train, test


def shuffled_forever(rows: Sequence[T], seed: int) -> Iterator[T]:
    """All rows in an order that the seed decides, then all of them in another, without end."""
    rng = random.Random(seed)
    while True:
        yield from rng.sample(rows, k=len(rows))


def _of_hub(source: str, split: str) -> Iterator[Entry]:
    name, _, config = source.partition(":")
    return read_hub(name, config or None, split)


def _problem(row: Row, fields: Mapping[str, type]) -> str | None:
    """What is wrong with a row; None when nothing is."""
    for name, kind in fields.items():
        if name not in row:
            return f"field {name!r} is missing; there are {', '.join(map(repr, row)) or 'none'}"
        if not _is_a(row[name], kind):
            return f"field {name!r} is {type(row[name]).__name__}, expected {kind.__name__}"
    return None


def _is_a(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
