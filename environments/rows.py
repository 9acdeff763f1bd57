"""Rows of a data set: read from a JSONL file or the Hugging Face hub, checked, split and shuffled the same way by every environment."""

from __future__ import annotations

import hashlib
import importlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from atroposlib.errors import ConfigError

Row = dict[str, Any]
T = TypeVar("T")

FILE_ENDINGS = (".jsonl", ".ndjson")


def load_rows(source: str | Path, *, fields: Mapping[str, type], split: str = "train") -> list[Row]:
    """Every row of a data set, in its order.

    Args:
        source: path of a JSONL file, or `owner/name` on the hub, `owner/name:config` where it has several configurations.
        fields: name and type of what each row must hold; further fields are kept. `float` takes whole numbers too.
        split: of a hub data set; a file has none.
    Raises:
        ConfigError: there is no such file or data set, or a row is not as promised; names the line.
    """
    is_file = isinstance(source, Path) or Path(source).exists() or source.endswith(FILE_ENDINGS)
    rows = _read_file(Path(source)) if is_file else _read_hub(str(source), split)
    found: list[Row] = []
    for place, row in rows:
        problem = _problem(row, fields)
        if problem is not None:
            raise ConfigError(f"{place}: {problem}")
        found.append(row)
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
        (test if _fraction(value) < share else train).append(row)
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


def _read_file(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the data set {str(path)!r}: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{place}: not JSON: {error}; write one object a line") from error
        yield place, row


def _read_hub(source: str, split: str) -> Iterator[tuple[str, Any]]:
    try:
        library = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"there is no file {source!r}, and data sets of the hub need `pip install datasets`; "
            f"give a path that ends in {', '.join(FILE_ENDINGS)}, or install it"
        ) from error
    name, _, config = source.partition(":")
    try:
        rows = library.load_dataset(name, config or None, split=split)
    # Whatever the library and the network raise, the reader needs the same facts.
    except Exception as error:
        raise ConfigError(f"cannot load {source!r}, split {split!r}, from the hub: {error}") from error
    for number, row in enumerate(rows):
        yield f"{source}, split {split}, row {number}", dict(row)


def _problem(row: Any, fields: Mapping[str, type]) -> str | None:
    """What is wrong with a row; None when nothing is."""
    if not isinstance(row, dict):
        return f"a row is an object, not {type(row).__name__}"
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


def _fraction(value: Any) -> float:
    """Where a value falls between 0 and 1, the same on every machine."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
